"""Initial values as the official PyTorch code draws them (spec: architectures 1.3 and 2.8)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

# timm's trunc_normal_(std=.02) cuts at the absolute values -2 and 2, a hundred deviations away: a plain normal.
linear_normal = nnx.initializers.normal(0.02)

# torch.nn.Conv2d and torch.nn.Linear: kaiming_uniform(a=sqrt 5), that is uniform within +-1/sqrt(fan_in).
torch_default = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def uniform(bound: float) -> Initializer:
    """Uniform within ``+-bound``."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_bias(fan_in: int) -> Initializer:
    """Bias of a PyTorch layer: uniform within +-1/sqrt(fan_in)."""
    return uniform(1 / math.sqrt(fan_in))


def a_log(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """S4D-real: log(1), ..., log(N) along the last axis, the same for every channel."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def dt_bias(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Inverse softplus of a time step drawn log-uniformly from [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(0.001), math.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))
