"""How a batch of images fills the 128 lanes of a register."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.chip import LANES, SUBLANES


def pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Fill an axis up to a size with zeros."""
    extra = size - x.shape[axis]
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How a batch fills lanes: ``slices`` groups of channels side by side, of ``images`` images each."""

    slices: int
    images: int

    @classmethod
    def of(cls, batch: int, channels: int) -> "Lanes":
        """Return the fullest use of 128 lanes."""
        if batch >= LANES:
            return cls(1, -(-batch // LANES) * LANES)
        fitting = [n for n in range(1, LANES // batch + 1) if channels % (n * SUBLANES) == 0]
        return cls(max(fitting, default=1), batch)

    def fold(self, x: jax.Array) -> jax.Array:
        """Bring (..., E, B) to (..., E / slices, slices * B)."""
        x = pad(x, x.ndim - 1, self.images)
        if self.slices == 1:
            return x
        *rest, channels, images = x.shape
        x = x.reshape(*rest, self.slices, channels // self.slices, images)
        return x.swapaxes(-3, -2).reshape(*rest, channels // self.slices, self.slices * images)

    def unfold(self, x: jax.Array, batch: int) -> jax.Array:
        """Bring (..., E / slices, slices * B) back to (..., E, B)."""
        if self.slices > 1:
            *rest, channels, _ = x.shape
            x = x.reshape(*rest, channels, self.slices, self.images)
            x = x.swapaxes(-3, -2).reshape(*rest, self.slices * channels, self.images)
        return x[..., :batch]

    def repeat(self, x: jax.Array) -> jax.Array:
        """Bring (..., B), the same for all channels, to (..., slices * B)."""
        x = pad(x, x.ndim - 1, self.images)
        return jnp.tile(x, self.slices) if self.slices > 1 else x

    def spread(self, x: jax.Array) -> jax.Array:
        """Bring parameters (..., E) to (..., E / slices, lanes of a block)."""
        width = min(self.images, LANES)
        x = jnp.broadcast_to(x[..., None], (*x.shape, width))
        if self.slices == 1:
            return x
        *rest, channels, images = x.shape
        x = x.reshape(*rest, self.slices, channels // self.slices, images)
        return x.swapaxes(-3, -2).reshape(*rest, channels // self.slices, self.slices * images)
