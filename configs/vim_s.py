"""Vim-S on ImageNet-1K, 224 px.

Published top-1: 80.5 (official README; 80.3 in arXiv:2401.09417v3, table 1). Not yet run here. 300 epochs: 750,600
steps of 512 images, 384,307,200 in all. The official code, which trains 232 images/s in float32 on an A100 by its
authors' measurement (VMamba's table 6), takes 58 hours on 8.
"""

from evmamba_jax.recipes.vim import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vim_s", batch_size=512, weight_decay=0.05, drop_path_rate=0.05)
