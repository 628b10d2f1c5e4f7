"""MambaVision-L on ImageNet-1K, 224 px.

Published top-1: 85.0 (arXiv:2407.08083, table 1). Not yet run here.
320 epochs: 99,840 steps of 4,096 images, 408,944,640 in all.
"""

from evmamba_jax.recipes.mambavision import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("mambavision_l", mesa=6.0, drop_path_rate=0.3, weight_decay=0.12)
