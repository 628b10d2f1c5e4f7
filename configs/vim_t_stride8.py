"""Vim-Ti+, Vim-Ti fine-tuned on ImageNet-1K with patches that overlap by half, 224 px.

Published top-1: 78.3 (arXiv:2401.09417v3, table 1). Not yet run here.
30 epochs: 37,530 steps of 1,024 images, 38,430,720 in all.
"""

from evmamba_jax.recipes.vim import fine_tuning
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return fine_tuning("vim_t_stride8")
