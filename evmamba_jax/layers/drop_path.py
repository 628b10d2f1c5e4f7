"""Stochastic depth, and dropout."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Drop(nnx.Module):
    """Drop parts of a batch with probability ``rate``, each by itself; kept ones are divided by ``1 - rate``.

    A subclass says in ``drawn`` what the parts are, and in ``NAME`` what a message calls it.
    """

    NAME: ClassVar[str]

    def __init__(self, rate: float):
        self.rate = rate
        self.keep: jax.Array | None = None  # 1 - rate, where a loop over blocks has it as a traced number
        self.deterministic = True

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to ``x`` (B, ...). ``key`` is needed in training mode when ``rate`` is not zero."""
        if self.deterministic or self.rate == 0:
            return x
        if key is None:
            raise ValueError(
                f"{self.NAME} with rate {self.rate} in training mode needs a random key: model(images, key=...)"
            )
        keep = 1 - self.rate if self.keep is None else self.keep
        kept = jax.random.bernoulli(key, keep, self.drawn(x.shape))
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)

    def drawn(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the draws for a batch of ``shape``, which they are broadcast to."""
        raise NotImplementedError


class DropPath(Drop):
    """Drop the whole branch of a sample.

    Source: Huang et al., Deep Networks with Stochastic Depth (2016); timm ``DropPath``.
    """

    NAME = "drop path"

    def drawn(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (B, 1, ...)."""
        return shape[:1] + (1,) * (len(shape) - 1)


class Dropout(Drop):
    """Drop single values. Source: Srivastava et al., Dropout (2014)."""

    NAME = "dropout"

    def drawn(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``shape``."""
        return shape


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rate of every block of every stage: from 0 for the first, linearly to ``rate`` for the last."""
    rates = iter(np.linspace(0, rate, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def fold_in(key: jax.Array | None, index: int) -> jax.Array | None:
    """Return the key of part ``index``, or None when there is no key to begin with."""
    return None if key is None else jax.random.fold_in(key, index)
