"""Vanilla-VMamba-T, the first version on ImageNet-1K, 224 px.

Published top-1: 82.2 (arXiv:2401.10166, table 6). Not yet run here. 300 epochs: 375,300 steps of 1,024 images,
384,307,200 in all. The official code, which trains 195 images/s on an A100 by its authors' measurement, takes 68 hours
on 8.

The released weights were trained with drop path 0.1 and without averaging (their file name and the official README),
the official yaml says 0.2.
"""

from evmamba_jax.recipes.vmamba import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vmamba_t_v0", drop_path_rate=0.1, ema_decay=0.0)
