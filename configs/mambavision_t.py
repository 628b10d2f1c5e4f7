"""MambaVision-T on ImageNet-1K, 224 px.

Published top-1: 82.3 (arXiv:2407.08083, table 1). Not yet run here.
320 epochs: 99,840 steps of 4,096 images, 408,944,640 in all.
"""

from evmamba_jax.recipes.mambavision import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("mambavision_t", mesa=0.5)
