"""Initial values as the official PyTorch code draws them: those of timm, torch.nn and VMamba's ``mamba_init``."""

import math
from typing import NamedTuple

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


def stacked_default(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """PyTorch's default for each matrix of a stack (K, in, out): uniform within +-1/sqrt(in)."""
    return uniform(shape[-2] ** -0.5)(key, shape, dtype)


def a_log(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """S4D-real: log(1), ..., log(N) along the last axis, the same for every channel."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def dt_bias(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Inverse softplus of a time step drawn log-uniformly from [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(0.001), math.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _tenth_of_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    return 0.1 * jax.random.uniform(key, shape, dtype)


class ScanInit(NamedTuple):
    """Initial values of the parameters of a selective scan; D always starts at 1."""

    x_proj: Initializer = stacked_default
    dt_proj: Initializer = stacked_default
    dt_bias: Initializer = dt_bias
    a_log: Initializer = a_log


# The choices of VMamba's study (its table 11, ssm_init v0, v1 and v2 in the code).
SCAN_INITS = {
    "mamba": ScanInit(),
    "random": ScanInit(
        dt_proj=nnx.initializers.normal(0.1), dt_bias=nnx.initializers.normal(0.1), a_log=nnx.initializers.normal(1.0)
    ),
    "zero": ScanInit(dt_proj=_tenth_of_uniform, dt_bias=_tenth_of_uniform, a_log=nnx.initializers.zeros),
}
