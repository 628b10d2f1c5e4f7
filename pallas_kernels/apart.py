"""Programs that XLA's CPU back end does not fuse with what comes before them.

It fuses an elementwise computation into each of its readers, and computes it again in each: an activation and the
convolution before it four times where four scans read them. ``jax.lax.optimization_barrier`` is gone before it fuses.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

R = TypeVar("R")


def read_once(function: Callable[..., R], *arrays: jax.Array) -> R:
    """Return ``function(*arrays)``; a CPU computes each of the arrays once, however often the function reads it."""

    def apart(*arrays):
        with set_xla_metadata(inlineable="false"):
            return jax.jit(function)(*arrays)

    return lax.platform_dependent(*arrays, cpu=apart, default=function)
