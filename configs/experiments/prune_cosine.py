"""Experiment 3: weights pruned by magnitude, layer by layer, along half a cosine from 10 to 70 % of the run.

The course measured 70.02 % on CIFAR-10 at 60 % of the candidates, which are 49.97 % of everything (one run with a
falling rate, which its other runs lack: prune_cosine:notebook), and no dense run beside it. Here in the one recipe of
all rows: 100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network:
prune_cosine:digits, :course_digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config, Duration, PruningConfig


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    config = recipe(variant)
    epochs = config.duration.epochs
    config.pruning = PruningConfig(
        method="gradual",
        final=0.6,
        begin=Duration(epochs=0.1 * epochs),
        end=Duration(epochs=0.7 * epochs),
        every=Duration(epochs=min(1, 0.05 * epochs)),
        factors=("head.kernel=0.5",),
    )
    if "notebook" in variant.split("_"):
        config.optim.min_lr = 0.0
    return config
