"""What calls over images and over sequences share."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.program import power_of_two
from pallas_kernels.gpu.triton import in_sight

LARGEST_STATE = 32  # more states leave a thread no registers
LONGEST = 65536  # tokens


def unsupported(state: int, length: int, interpret: bool, image: jax.Array, *others: jax.Array) -> str | None:
    """Return why no kernel can do a call, or None."""
    if not interpret and not in_sight():
        return "there is no GPU to compile for; describe one with jax.set_mesh or jax.sharding.use_abstract_mesh"
    if image.dtype not in (jnp.float32, jnp.bfloat16):
        return f"they take float32 and bfloat16, not {image.dtype}"
    if any(x.dtype == jnp.float64 for x in others):
        return "they do not take float64"
    if state > LARGEST_STATE:
        return f"they take a state of up to {LARGEST_STATE}, not {state}"
    return f"they take up to {LONGEST} tokens, not {length}" if length > LONGEST else None


def sum_layers(layers: jax.Array) -> jax.Array:
    """Return the sum of what several programs found for the same pixels."""
    return layers[0] if layers.shape[0] == 1 else layers.sum(0)


def fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Fill up an axis with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def fill_states(x: jax.Array, axis: int = -1) -> jax.Array:
    """Fill up an axis of N states, to a power of two, with states that stay zero."""
    return fill(x, axis, power_of_two(x.shape[axis]))
