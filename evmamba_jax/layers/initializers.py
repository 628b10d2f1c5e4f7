"""Initial values as the official PyTorch code draws them: rules of timm, torch.nn and VMamba's ``mamba_init``."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Initializer
from scipy.special import erfinv

# JAX compiles a program for every shape that it draws, a hundred for a model, which takes far longer than drawing.
# Outside of a traced function NumPy therefore draws the same numbers, up to the last bit of the error function.
_PIECE = 2**15  # numbers at a time, few enough to stay in a cache


def _bits(key: jax.Array, count: int) -> np.ndarray:
    """Return what ``jax.random.bits`` does: Threefry-2x32 of each place, its two words combined; uint32 (count,).

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    first, second = (int(word) for word in np.asarray(jax.random.key_data(key)))
    keys = first, second, first ^ second ^ 0x1BD11BDA
    bits = np.empty(count, np.uint32)
    for start in range(0, count, _PIECE):
        place = np.arange(start, min(start + _PIECE, count), dtype=np.uint64)
        x, y = (place >> 32).astype(np.uint32), place.astype(np.uint32)
        x += np.uint32(keys[0])
        y += np.uint32(keys[1])
        for group in range(5):
            for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
                x += y
                y = (y << rotation | y >> (32 - rotation)) ^ x
            x += np.uint32(keys[(group + 1) % 3])
            y += np.uint32((keys[(group + 2) % 3] + group + 1) % 2**32)
        bits[start : start + _PIECE] = x ^ y
    return bits


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype, low: float, high: float) -> jax.Array | np.ndarray:
    """Return numbers from ``low`` to below ``high``, of NumPy where it can draw those of ``jax.random.uniform``."""
    ours = not isinstance(key, jax.core.Tracer) and jax.random.key_impl(key) == "threefry2x32"
    if not ours or dtype != jnp.float32:
        return jax.random.uniform(key, shape, dtype, low, high)
    unit = (_bits(key, math.prod(shape)) >> 9 | np.float32(1).view(np.uint32)).view(np.float32) - np.float32(1)
    lowest, highest = np.float32(low), np.float32(high)
    return np.maximum(lowest, unit * (highest - lowest) + lowest).reshape(shape)


def normal(deviation: float) -> Initializer:
    """Normal with mean 0."""

    return _normal(deviation, np.nextafter(np.float32(-1), np.float32(0)), 1)


def lecun_normal(fan_in: int) -> Initializer:
    """Normal with mean 0 and variance 1/fan_in, after a cut at two deviations of what is drawn: Flax's rule."""
    share = math.erf(math.sqrt(2))
    return _normal(fan_in**-0.5 / 0.87962566103423978, -share, share)


def _normal(deviation: float, low: float, high: float) -> Initializer:
    """Return what draws the normal numbers whose error functions are from ``low`` to ``high``."""

    def draw(key, shape, dtype=jnp.float32):
        share = _uniform(key, shape, dtype, low, high)
        if isinstance(share, np.ndarray):
            return jax.device_put(np.float32(deviation * math.sqrt(2)) * erfinv(share))
        return deviation * math.sqrt(2) * jax.lax.erf_inv(share)

    return draw


def uniform(low: float, high: float) -> Initializer:
    """Uniform from ``low`` to below ``high``."""
    return lambda key, shape, dtype=jnp.float32: jax.device_put(_uniform(key, shape, dtype, low, high))


def within(bound: float) -> Initializer:
    """Uniform within ``+-bound``."""
    return uniform(-bound, bound)


def full(shape: int | tuple[int, ...], value: float, dtype=jnp.float32) -> jax.Array:
    """Return ``jnp.full(shape, value)`` without a compiler, which JAX calls for every shape."""
    return jax.device_put(np.full(shape, value, dtype))


def _constant(value: float) -> Initializer:
    return lambda key, shape, dtype=jnp.float32: full(shape, value, dtype)


zeros, ones = _constant(0), _constant(1)

# timm's trunc_normal_(std=.02) cuts at the absolute values -2 and 2, a hundred deviations away: a plain normal.
linear_normal = normal(0.02)


def torch_default(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Kernel (..., in, out) of torch.nn.Conv2d and Linear, kaiming_uniform(a=sqrt 5): within +-1/sqrt(fan_in)."""
    return within(math.prod(shape[:-1]) ** -0.5)(key, shape, dtype)


def torch_bias(fan_in: int) -> Initializer:
    """Bias of a PyTorch layer: uniform within +-1/sqrt(fan_in)."""
    return within(1 / math.sqrt(fan_in))


def stacked_default(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """PyTorch's default for each matrix of a stack (K, in, out): uniform within +-1/sqrt(in)."""
    return within(shape[-2] ** -0.5)(key, shape, dtype)


def a_log(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """S4D-real: log(1), ..., log(N) along the last axis, the same for every channel."""
    del key
    return jax.device_put(np.broadcast_to(np.log(np.arange(1, shape[-1] + 1)), shape).astype(dtype))


# A time step between 0.001 and 0.1, log-uniform.
log_dt = uniform(math.log(0.001), math.log(0.1))


def dt_bias(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Inverse softplus of a time step drawn log-uniformly from [0.001, 0.1]."""
    log = _uniform(key, shape, dtype, math.log(0.001), math.log(0.1))
    xp = np if isinstance(log, np.ndarray) else jnp
    dt = xp.exp(log)
    return jax.device_put(dt + xp.log(-xp.expm1(-dt)))


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues and eigenvectors of the normal part of HiPPO-LegS.

    Returns:
        The imaginary parts (N,), ascending; all real parts are -1/2. The unitary matrix (N, N) with an eigenvector in
        each column. Both in 64 bits.

    Source: Gu et al., HiPPO (arXiv:2008.07669); S5's ``make_DPLR_HiPPO``.
    """
    n = np.arange(size)
    root = np.sqrt(1.0 + 2 * n)
    matrix = np.diag(n) - np.tril(root[:, None] * root)
    low_rank = np.sqrt(n + 0.5)
    return np.linalg.eigh(-1j * (matrix + low_rank[:, None] * low_rank))


class ScanInit(NamedTuple):
    """Initial values of the parameters of a selective scan; D always starts at 1."""

    x_proj: Initializer = stacked_default
    dt_proj: Initializer = stacked_default
    dt_bias: Initializer = dt_bias
    a_log: Initializer = a_log


# The choices of VMamba's study (its table 11, ssm_init v0, v1 and v2 in the code).
SCAN_INITS = {
    "mamba": ScanInit(),
    "random": ScanInit(dt_proj=normal(0.1), dt_bias=normal(0.1), a_log=normal(1.0)),
    "zero": ScanInit(dt_proj=uniform(0, 0.1), dt_bias=uniform(0, 0.1), a_log=zeros),
}
