"""The heads of R-CNNs: proposals of every anchor, then class, box and mask of every region."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from einops import rearrange
from flax import nnx
from flax.typing import Dtype, Initializer

from evmamba_jax.heads.conv import ConvNorm, ConvNormReLU
from evmamba_jax.heads.maps import Deconv
from evmamba_jax.heads.region_conv import region_conv
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.norm import BatchNorm


class RPNHead(nnx.Module):
    """3x3 convolutions with ReLU, then a linear layer each: whether there is an object, and deltas of its box.

    Args:
        anchors: A of every pixel.
        in_width: channels of the levels.
        width: channels of the convolutions.
        convs: how many there are.
        init_std: deviation of the kernels' initial values, which are normal; the official one is 0.01.
        dtype: compute type.
        rngs: source of the initial values: biases are 0.

    Source: Ren et al., Faster R-CNN (arXiv:1506.01497), section 3.1; mmdet 3.3.0
    ``mmdet/models/dense_heads/rpn_head.py``.
    """

    def __init__(
        self,
        anchors: int,
        in_width: int,
        width: int,
        *,
        convs: int = 1,
        init_std: float = 0.01,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"kernel_init": init.normal(init_std), "bias_init": init.zeros, "dtype": dtype, "rngs": rngs}
        inputs = [in_width, *[width] * (convs - 1)]
        self.convs = nnx.List(nnx.Conv(c, width, (3, 3), padding=1, **layer) for c in inputs)
        self.cls = nnx.Linear(width, anchors, **layer)
        self.reg = nnx.Linear(width, anchors * 4, **layer)

    def __call__(self, levels: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Map the levels [(B, h, w, in_width), ...] to logits [(B, h, w, A), ...] and deltas [(B, h, w, A * 4), ...].

        The channels of an anchor follow each other.
        """
        for conv in self.convs:
            levels = [nnx.relu(conv(x)) for x in levels]
        return [self.cls(x) for x in levels], [self.reg(x) for x in levels]


def xavier(c_in: int, c_out: int) -> Initializer:
    """Return Xavier's uniform rule for a linear layer."""
    return init.within(math.sqrt(6 / (c_in + c_out)))


def xavier_fill(c_in: int, c_out: int) -> Initializer:
    """Return what Detectron2 (``c2_xavier_fill``) takes for Xavier's rule: uniform by the inputs alone."""
    del c_out
    return init.within(math.sqrt(3 / c_in))


class BoxHead(nnx.Module):
    """Layers with ReLU, then a linear one each: logits of classes and background, deltas for each class or for all.

    Args:
        num_classes: K, without a background.
        in_width: channels C of the regions.
        width: channels of the fully connected layers.
        size: side S of the regions.
        convs: how many 3x3 convolutions with a norm, of C channels, come first.
        norm: makes the norm of so many channels.
        fcs: how many fully connected layers follow.
        fc_init: the rule of their kernels, by their channels.
        class_agnostic: one box serves all classes.
        dtype: compute type.
        rngs: source of the initial values: kernels of classes N(0, .01), of deltas N(0, .001); biases 0.

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
        norm: Any = BatchNorm,
        fcs: int = 2,
        fc_init: Callable[[int, int], Initializer] = xavier,
        class_agnostic: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"dtype": dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, bias_init=init.zeros, **layer)
        conv = functools.partial(ConvNormReLU, in_width, in_width, 3, norm=norm, convolution=region_conv, **layer)
        self.convs = nnx.List(conv() for _ in range(convs))
        inputs = [size * size * in_width, *[width] * (fcs - 1)]
        self.fcs = nnx.List(linear(c, width, kernel_init=fc_init(c, width)) for c in inputs)
        self.cls = linear(width, num_classes + 1, kernel_init=init.normal(0.01))
        self.class_layers = ("cls",) if class_agnostic else ("cls", "reg")  # which have something for each class
        self.reg = linear(width, 4 if class_agnostic else num_classes * 4, kernel_init=init.normal(0.001))

    def __call__(self, regions: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map regions (R, S, S, C) to logits (R, K + 1), the background last, and deltas (R, K or 1, 4).

        BatchNorm in training mode has the statistics of the regions that are ``counted`` (R,).
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
        norm: makes the norm of so many channels, which follows each of these convolutions; None: they have a bias.
        logits_init: of the last kernel; None: as the others.
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
        norm: Any = None,
        logits_init: Initializer | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"dtype": dtype, "rngs": rngs}
        with_bias = {"bias_init": init.zeros, **layer}
        fan_out = lambda pixels, channels: init.normal(math.sqrt(2 / (pixels * channels)))  # noqa: E731
        if norm is None:
            conv = functools.partial(
                nnx.Conv,
                kernel_size=(3, 3),
                padding=1,
                kernel_init=fan_out(9, width),
                conv_general_dilated=region_conv,
                **with_bias,
            )
        else:
            conv = functools.partial(ConvNorm, size=3, norm=norm, convolution=region_conv, **layer)
        self.convs = nnx.List(conv(c, width) for c in [in_width, *[width] * (depth - 1)])
        self.upsample = Deconv(width, width, kernel_init=fan_out(4, width), **with_bias)
        logits_init = logits_init or fan_out(1, num_classes)
        self.logits = nnx.Linear(width, num_classes, kernel_init=logits_init, **with_bias)

    def __call__(self, regions: jax.Array) -> jax.Array:
        """Map regions (R, S, S, C) to logits (R, 2S, 2S, K)."""
        for conv in self.convs:
            regions = nnx.relu(conv(regions))
        return self.logits(nnx.relu(self.upsample(regions)))
