"""Normalisation with the arithmetic of the official PyTorch layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init

# Statistics in float32 or wider, epsilon 1e-5. The two-pass variance keeps float32 logits within a few units in the
# last place of the official ones.
LayerNorm = partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False, bias_init=init.zeros, scale_init=init.ones)

# Computed in the type of its input and scale: the compute type would round a float32 residual stream before its mean.
RMSNorm = partial(nnx.RMSNorm, epsilon=1e-5, scale_init=init.ones)


class CountedLayerNorm(nnx.Module):
    """A LayerNorm over channels of which some are gone because they were always zero: it goes on counting them.

    Args:
        norm: the norm, its scale and bias of the channels that are left.
        of: how many channels there were.
    """

    def __init__(self, norm: Any, of: int):
        self.scale, self.bias = norm.scale, norm.bias
        self.of = of
        self.epsilon = norm.epsilon
        self.dtype = norm.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x`` (..., C) as if its ``of - C`` further channels were zero."""
        wide = jnp.promote_types(x.dtype, self.scale.dtype)
        x = x.astype(jnp.promote_types(wide, jnp.float32))
        mean = x.sum(-1, keepdims=True) / self.of
        gone = (self.of - x.shape[-1]) * jnp.square(mean)
        var = (jnp.square(x - mean).sum(-1, keepdims=True) + gone) / self.of
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype or wide)


def counted(norm: Any) -> Any:
    """Return a norm whose arrays were cut, counting the channels that it had before."""
    if isinstance(norm, CountedLayerNorm) or norm.scale.shape[0] == norm.num_features:
        return norm
    return CountedLayerNorm(norm, norm.num_features)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, as ``torch.nn.BatchNorm2d`` computes it.

    Differs from ``flax.nnx.BatchNorm`` in two ways: the running variance takes the unbiased batch variance, and the
    normalisation is computed in the wider of the input's and the statistics' types (so a float64 input is not rounded
    by float32 statistics). Under ``jax.jit`` with a sharded batch the statistics are the global batch's.

    Args:
        features: number of channels C.
        momentum: weight of the old running statistics, 1 minus PyTorch's.
        epsilon: added to the variance.
        dtype: type of the output; ``None`` takes the promoted type of input and parameters.
        rngs: unused, for the signature shared by all layers.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        del rngs
        self.scale = nnx.Param(init.full(features, 1))
        self.bias = nnx.Param(init.full(features, 0))
        self.mean = nnx.BatchStat(init.full(features, 0))
        self.var = nnx.BatchStat(init.full(features, 1))
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.use_running_average = True

    def __call__(self, x: jax.Array, counted: jax.Array | None = None) -> jax.Array:
        """Normalise ``x`` (..., C); in training mode with its own statistics, which the running ones then follow.

        Args:
            x: (B, ..., C).
            counted: (B,) False for rows that statistics leave out, such as padding; None: all count.
        """
        wide = jnp.promote_types(x.dtype, self.scale.dtype)
        out_dtype = self.dtype or wide
        x = x.astype(jnp.promote_types(wide, jnp.float32))
        if self.use_running_average:
            mean, var = self.mean[...].astype(x.dtype), self.var[...].astype(x.dtype)
        else:
            mean, var, unbiased = _moments(x) if counted is None else _moments_of(x, counted)
            self.mean[...] = self._follow(self.mean[...], mean)
            self.var[...] = self._follow(self.var[...], unbiased)
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(out_dtype)

    def _follow(self, running: jax.Array, batch: jax.Array) -> jax.Array:
        return self.momentum * running + (1 - self.momentum) * batch.astype(running.dtype)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean, variance and unbiased variance (C,) of ``x`` (..., C)."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    count = x.size // x.shape[-1]
    return mean, var, var * (count / max(count - 1, 1))


def _moments_of(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what :func:`_moments` does of the rows of ``x`` (B, ..., C) that count (B,); zeros where none does."""
    axes = tuple(range(x.ndim - 1))
    there = counted.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
    count = there.sum() * (x[0].size // x.shape[-1])
    mean = (x * there).sum(axes) / jnp.maximum(count, 1)
    squares = (jnp.square(x - mean) * there).sum(axes)
    return mean, squares / jnp.maximum(count, 1), squares / jnp.maximum(count - 1, 1)
