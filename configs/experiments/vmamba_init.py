"""A small VMamba on Fashion-MNIST with other initial values or another activation: experiments/vmamba_init:random_silu.

VMamba's tables 11 and 15 have it that training is robust to both. The name is INIT_ACT: mamba, random or zero for the
scans' parameters; silu, gelu or relu before the scans. 1 epoch: 468 steps of 128 images, 59,904 in all. Three seeds of
each: benchmarks/results/vmamba_init.md.
"""

from evmamba_jax.recipes.fashion_mnist import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "mamba_silu") -> Config:
    """Return the configuration of a variant."""
    init, _, act = variant.partition("_")
    options = {"width": 16, "depths": (1, 1, 1, 1), "init": init, "act": act}
    return recipe("vmamba_t", batch_size=128, epochs=1, evaluations=2, **options)
