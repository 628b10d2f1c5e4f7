"""MambaVision-S on ImageNet-1K, 224 px.

Published top-1: 83.3 (arXiv:2407.08083, table 1). Not yet run here.
320 epochs: 99,840 steps of 4,096 images, 408,944,640 in all.

The official training file evaluates at crop 0.875, the model card at 0.93 as here.
"""

from evmamba_jax.recipes.mambavision import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("mambavision_s", mesa=1.0, crop_pct=0.93)
