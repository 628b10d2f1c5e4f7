"""Vanilla-VMamba-B, the first version on ImageNet-1K, 224 px.

Published top-1: 83.7 (arXiv:2401.10166, table 6). Not yet run here. 300 epochs: 375,300 steps of 1,024 images,
384,307,200 in all. The official code, which trains 84 images/s on an A100 by its authors' measurement, takes 159 hours
on 8.

The released weights were trained with drop path 0.6 (their file name), the official yaml says 0.5.
"""

from evmamba_jax.recipes.vmamba import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vmamba_b_v0", drop_path_rate=0.6)
