"""The heads of R-CNNs: proposals of every anchor, then class, box and mask of every region."""

import functools
import math
from collections.abc import Sequence

import jax
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.heads.conv import ConvNormReLU
from evmamba_jax.heads.maps import Deconv
from evmamba_jax.layers import initializers as init


class RPNHead(nnx.Module):
    """One 3x3 convolution with ReLU, then a linear layer each: whether there is an object, and deltas of its box.

    Args:
        anchors: A of every pixel.
        in_width: channels of the levels.
        width: channels between.
        dtype: compute type.
        rngs: source of the initial values: kernels N(0, .01), biases 0.

    Source: Ren et al., Faster R-CNN (arXiv:1506.01497), section 3.1; mmdet 3.3.0
    ``mmdet/models/dense_heads/rpn_head.py``.
    """

    def __init__(self, anchors: int, in_width: int, width: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        layer = {"kernel_init": init.normal(0.01), "bias_init": init.zeros, "dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(in_width, width, (3, 3), padding=1, **layer)
        self.cls = nnx.Linear(width, anchors, **layer)
        self.reg = nnx.Linear(width, anchors * 4, **layer)

    def __call__(self, levels: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Map the levels [(B, h, w, in_width), ...] to logits [(B, h, w, A), ...] and deltas [(B, h, w, A * 4), ...].

        The channels of an anchor follow each other.
        """
        hidden = [nnx.relu(self.conv(x)) for x in levels]
        return [self.cls(x) for x in hidden], [self.reg(x) for x in hidden]


class BoxHead(nnx.Module):
    """Layers with ReLU, then a linear one each: logits of classes and background, deltas for each class.

    Args:
        num_classes: K, without a background.
        in_width: channels C of the regions.
        width: channels of the fully connected layers.
        size: side S of the regions.
        convs: how many 3x3 convolutions with BatchNorm, of C channels, come first.
        fcs: how many fully connected layers follow.
        dtype: compute type.
        rngs: source of the initial values: kernels of fully connected layers Xavier's uniform, of classes N(0, .01), of
            deltas N(0, .001); biases 0.

    Source: mmdet 3.3.0 ``mmdet/models/roi_heads/bbox_heads/convfc_bbox_head.py``.
    """

    def __init__(
        self,
        num_classes: int,
        in_width: int = 256,
        width: int = 1024,
        *,
        size: int = 7,
        convs: int = 0,
        fcs: int = 2,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        def linear(c_in: int, c_out: int, deviation: float | None = None) -> nnx.Linear:
            drawn = init.within(math.sqrt(6 / (c_in + c_out))) if deviation is None else init.normal(deviation)
            return nnx.Linear(c_in, c_out, kernel_init=drawn, bias_init=init.zeros, dtype=dtype, rngs=rngs)

        self.convs = nnx.List(ConvNormReLU(in_width, in_width, 3, dtype=dtype, rngs=rngs) for _ in range(convs))
        inputs = [size * size * in_width, *[width] * (fcs - 1)]
        self.fcs = nnx.List(linear(c, width) for c in inputs)
        self.cls = linear(width, num_classes + 1, 0.01)
        self.reg = linear(width, num_classes * 4, 0.001)

    def __call__(self, regions: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map regions (R, S, S, C) to logits (R, K + 1), the background last, and deltas (R, K, 4).

        Norms in training mode have the statistics of the regions that are ``counted`` (R,).
        """
        for conv in self.convs:
            regions = conv(regions, counted)
        hidden = rearrange(regions, "r h w c -> r (h w c)")
        for fc in self.fcs:
            hidden = nnx.relu(fc(hidden))
        return self.cls(hidden), rearrange(self.reg(hidden), "r (k d) -> r k d", d=4)


class MaskHead(nnx.Module):
    """3x3 convolutions with ReLU, a transposed one of stride 2 with ReLU, then logits of a mask for each class.

    Args:
        num_classes: K.
        in_width: channels C of the regions.
        width: channels of the convolutions.
        depth: of the convolutions before the transposed one.
        dtype: compute type.
        rngs: source of the initial values: Kaiming's normal kernels by the fan out, biases 0.

    Source: He et al., Mask R-CNN (arXiv:1703.06870), section 3; mmdet 3.3.0
    ``mmdet/models/roi_heads/mask_heads/fcn_mask_head.py``.
    """

    def __init__(
        self,
        num_classes: int,
        in_width: int = 256,
        width: int = 256,
        *,
        depth: int = 4,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"bias_init": init.zeros, "dtype": dtype, "rngs": rngs}
        fan_out = lambda pixels, channels: init.normal(math.sqrt(2 / (pixels * channels)))  # noqa: E731
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding=1, kernel_init=fan_out(9, width), **layer)
        self.convs = nnx.List(conv(c, width) for c in [in_width, *[width] * (depth - 1)])
        self.upsample = Deconv(width, width, kernel_init=fan_out(4, width), **layer)
        self.logits = nnx.Linear(width, num_classes, kernel_init=fan_out(1, num_classes), **layer)

    def __call__(self, regions: jax.Array) -> jax.Array:
        """Map regions (R, S, S, C) to logits (R, 2S, 2S, K)."""
        for conv in self.convs:
            regions = nnx.relu(conv(regions))
        return self.logits(nnx.relu(self.upsample(regions)))
