"""VMamba-T (ssm_ratio 1, 8 blocks in stage 3) on ImageNet-1K, 224 px.

Published top-1: 82.6 (arXiv:2401.10166, table 6). Not yet run here. 300 epochs: 375,300 steps of 1,024 images,
384,307,200 in all. The official code, which trains 571 images/s on an A100 by its authors' measurement, takes 23 hours
on 8. On a v5e-8 the preflight's estimate was 100 to 108 ms a step, 10.4 to 11.3 hours in all, when GELU in bfloat16
took longer; docs/preflight.md says how far to trust it.
"""

from evmamba_jax.recipes.vmamba import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vmamba_t", drop_path_rate=0.2)
