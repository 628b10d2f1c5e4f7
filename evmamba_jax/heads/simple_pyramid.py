"""The pyramid of a plain backbone's detector: every level is made from the last map alone.

Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (arXiv:2203.16527), section 3.
"""

from collections.abc import Sequence

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.heads.conv import ChannelNorm, ConvNorm
from evmamba_jax.heads.fpn import every_second
from evmamba_jax.heads.maps import STRIDES, Enlarge, check_stride, reduced
from evmamba_jax.layers import initializers as init


class Level(nnx.Module):
    """A map of one stride as a level of another: enlarged or reduced, then two convolutions with a norm each.

    Args:
        c_in: channels C of the map, halved whenever the map is enlarged to twice its size.
        width: channels of the level.
        stride: pixels of a cell of the map.
        wanted: pixels of a cell of the level.
        dtype: compute type.
        rngs: source of the initial values.
    """

    def __init__(self, c_in: int, width: int, stride: int, wanted: int, *, dtype: Dtype | None, rngs: nnx.Rngs):
        layer = {"norm": ChannelNorm, "dtype": dtype, "rngs": rngs}
        widths = [c_in // 2**i for i in range((stride // wanted).bit_length())]
        self.enlarge = Enlarge(widths, **layer) if wanted < stride else None
        self.side = wanted // stride
        self.lateral = ConvNorm([c_in, *widths][-1], width, 1, kernel_init=init.torch_default, **layer)
        self.output = ConvNorm(width, width, 3, kernel_init=init.torch_default, **layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, h, w, width)."""
        if self.enlarge is not None:
            x = self.enlarge(x)
        elif self.side > 1:
            x = reduced(x, self.side)
        return self.output(self.lateral(x))


class SimplePyramid(nnx.Module):
    """Levels of 4, 8, 16 and 32 pixels from one map, and further ones of every second pixel of the level before.

    Args:
        c_in: channels of the map.
        stride: pixels of a cell of the map: 4, 8 or 16.
        width: channels of every level.
        levels: of the pyramid, at least four.
        dtype: compute type.
        rngs: source of the initial values, PyTorch's.

    Raises:
        UserError: another stride.

    Source: hustvl/Vim ``det/detectron2/modeling/backbone/vit.py`` at dd0358a, ``SimpleFeaturePyramid``.
    """

    def __init__(
        self, c_in: int, stride: int, *, width: int = 256, levels: int = 5, dtype: Dtype | None = None, rngs: nnx.Rngs
    ):
        check_stride(stride)
        self.stride = stride
        self.levels = nnx.List(Level(c_in, width, stride, wanted, dtype=dtype, rngs=rngs) for wanted in STRIDES)
        self.pooled = levels - len(STRIDES)

    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Map the last of a backbone's maps, (B, H, W, c_in), to the levels [(B, h, w, width), ...] from fine."""
        levels = [level(maps[-1]) for level in self.levels]
        for _ in range(self.pooled):
            levels.append(every_second(levels[-1]))
        return levels
