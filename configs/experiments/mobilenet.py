"""Experiment 2: MobileNetV2's inverted residual before each scan; Vim's on the grid, mobilenet:course's along tokens.

The course claimed less computation, and measured 68.27 % on CIFAR-10 (one run, batches of 128 in two rounds, constant
rate: mobilenet:notebook) with 3.26 times the parameters. Here in the one recipe of all rows:
100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network: mobilenet:digits, :course_digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    block = {"local": "inverted_residual"}
    config = recipe(variant, options={"vim": block, "course": block})
    if "notebook" in variant.split("_"):
        config.batch_size, config.accumulation = 128, 2
    return config
