"""Vim-B on ImageNet-1K, 224 px.

Published top-1: 81.9 (arXiv:2401.09417v3, table 1). Not yet run here.
300 epochs: 750,600 steps of 512 images, 384,307,200 in all.

Weights were released, a recipe was not: this is the one of S.
"""

from evmamba_jax.recipes.vim import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vim_b", batch_size=512, weight_decay=0.05, drop_path_rate=0.05)
