"""MSVMamba-Base (NeurIPS) on ImageNet-1K, 224 px.

Published top-1: 84.4 (Multi-Scale VMamba, NeurIPS 2024, ImageNet-1K table). Not yet run here.
300 epochs: 375,300 steps of 1,024 images, 384,307,200 in all.
"""

from evmamba_jax.recipes.msvmamba import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("msvmamba_b_v2", drop_path_rate=0.5, lr=6e-4, min_lr=6e-6)
