"""Vim-Ti on ImageNet-1K, 224 px.

Published top-1: 76.1 (arXiv:2401.09417v3, table 1). Not yet run here.
300 epochs: 375,300 steps of 1,024 images, 384,307,200 in all.
"""

from evmamba_jax.recipes.vim import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vim_t", batch_size=1024, weight_decay=0.1, drop_path_rate=0.0)
