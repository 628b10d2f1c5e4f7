"""The feature pyramid of the detectors: every level sees what the coarser ones know."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.resize import resize

Extra = Literal["max_pool", "on_input"]


class FPN(nnx.Module):
    """Feature pyramid: 1x1 laterals, nearest upsampling from top to bottom, 3x3 outputs; no norm, no activation.

    Args:
        widths: channels of the backbone's maps, from fine to coarse.
        width: channels of every level.
        start_level: the first of the maps that is used.
        levels: of the pyramid, at least as many as the maps used.
        extra: what makes the levels beyond the maps. "max_pool" takes every second pixel of the level before.
            "on_input" is a 3x3 convolution of stride 2, the first of them on the coarsest map of the backbone, the
            others on the level before.
        dtype: compute type.
        rngs: source of the initial values: Xavier's uniform kernels, zero biases.

    Raises:
        UserError: fewer levels than maps, or a start level beyond them.

    Source: Lin et al., Feature Pyramid Networks (arXiv:1612.03144); mmdet 3.3.0 ``mmdet/models/necks/fpn.py``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        width: int = 256,
        *,
        start_level: int = 0,
        levels: int = 5,
        extra: Extra = "max_pool",
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        used = widths[start_level:]
        if not 0 < len(used) <= levels:
            raise UserError(
                f"levels={levels} of a pyramid must be at least its maps, {len(used)}, and there must be one"
            )

        def conv(c_in: int, stride: int = 1) -> nnx.Conv:
            # PyTorch's fans count the pixels of the kernel.
            bound = math.sqrt(6 / (9 * (c_in + width)))
            return nnx.Conv(
                c_in,
                width,
                (3, 3),
                strides=stride,
                padding=1,
                kernel_init=init.within(bound),
                bias_init=init.zeros,
                dtype=dtype,
                rngs=rngs,
            )

        self.start_level = start_level
        self.pooled = levels - len(used) if extra == "max_pool" else 0
        self.laterals = nnx.List(
            nnx.Linear(
                c,
                width,
                kernel_init=init.within(math.sqrt(6 / (c + width))),
                bias_init=init.zeros,
                dtype=dtype,
                rngs=rngs,
            )
            for c in used
        )
        self.outputs = nnx.List(conv(width) for _ in used)
        inputs = [] if self.pooled else [used[-1], *[width] * (levels - len(used))][: levels - len(used)]
        self.extra = nnx.List(conv(c, stride=2) for c in inputs)

    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Map the backbone's maps [(B, h, w, C), ...] to the levels [(B, h, w, width), ...], from fine to coarse."""
        maps = maps[self.start_level :]
        sums = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(1, len(sums))):
            sums[i - 1] = sums[i - 1] + upsample(sums[i], *sums[i - 1].shape[1:3])
        levels = [output(x) for output, x in zip(self.outputs, sums, strict=True)]
        for _ in range(self.pooled):
            levels.append(every_second(levels[-1]))
        for i, conv in enumerate(self.extra):
            levels.append(conv(levels[-1] if i else maps[-1]))
        return levels


def upsample(x: jax.Array, height: int, width: int) -> jax.Array:
    """Return (B, h, w, C) as (B, height, width, C), each pixel from cell ``floor(i * old / new)`` of its axis."""
    batch, h, w, c = x.shape
    if height % h or width % w:
        return resize(x, height, width, "nearest")
    # Repeating has a sum for its gradient, where indexing has a scatter.
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, height // h, w, width // w, c))
    return x.reshape(batch, height, width, c)


def every_second(x: jax.Array) -> jax.Array:
    """Return (B, h, w, C) as (B, ceil(h/2), ceil(w/2), C): what a max pool of window 1 and stride 2 leaves."""
    return x[:, ::2, ::2]
