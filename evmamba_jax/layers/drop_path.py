"""Stochastic depth."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class DropPath(nnx.Module):
    """Drop the whole branch of a sample with probability ``rate``; kept branches are divided by ``1 - rate``.

    Source: Huang et al., Deep Networks with Stochastic Depth (2016); timm ``DropPath``.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.keep: jax.Array | None = None  # 1 - rate, where a loop over blocks has it as a traced number
        self.deterministic = True

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to a branch ``x`` (B, ...). ``key`` is needed in training mode when ``rate`` is not zero."""
        if self.deterministic or self.rate == 0:
            return x
        if key is None:
            raise ValueError(
                f"drop path with rate {self.rate} in training mode needs a random key: model(images, key=...)"
            )
        keep = 1 - self.rate if self.keep is None else self.keep
        kept = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rate of every block of every stage: from 0 for the first, linearly to ``rate`` for the last."""
    rates = iter(np.linspace(0, rate, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def fold_in(key: jax.Array | None, index: int) -> jax.Array | None:
    """Return the key of part ``index``, or None when there is no key to begin with."""
    return None if key is None else jax.random.fold_in(key, index)
