"""The head of RetinaNet: classes and boxes for every anchor of every pixel, with one set of weights for all levels."""

import functools
import math
from collections.abc import Sequence

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init

PRIOR = 0.01  # the share of objects that the classes start from


class RetinaNetHead(nnx.Module):
    """Two towers of 3x3 convolutions and ReLU, then one 3x3 convolution each: logits of classes, deltas of boxes.

    Args:
        num_classes: K, without a background.
        anchors: A of every pixel.
        in_width: channels of the levels.
        width: channels of the towers.
        depth: convolutions of a tower.
        dtype: compute type.
        init_std: deviation of the kernels' initial values, which are normal; the official one is 0.01.
        rngs: source of the initial values: biases are 0, those of the classes ``-log(99)``, so that
            every class starts at a probability of .01.

    Source: Lin et al., Focal Loss for Dense Object Detection (arXiv:1708.02002), section 4; mmdet 3.3.0
    ``mmdet/models/dense_heads/retina_head.py``.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: int,
        in_width: int = 256,
        width: int = 256,
        *,
        depth: int = 4,
        init_std: float = 0.01,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), padding=1, kernel_init=init.normal(init_std), dtype=dtype, rngs=rngs
        )

        def tower() -> nnx.List:
            inputs = [in_width, *[width] * (depth - 1)]
            return nnx.List(conv(c, width, bias_init=init.zeros) for c in inputs)

        self.cls_tower = tower()
        self.reg_tower = tower()
        rare = lambda key, shape, dtype: init.full(shape, -math.log((1 - PRIOR) / PRIOR), dtype)  # noqa: E731
        self.cls = conv(width, anchors * num_classes, bias_init=rare)
        self.reg = conv(width, anchors * 4, bias_init=init.zeros)

    def __call__(self, levels: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Map the levels [(B, h, w, in_width), ...] to logits and deltas.

        The channels of an anchor follow each other: all of the first anchor, then all of the second.

        Returns:
            [(B, h, w, A * K), ...] and [(B, h, w, A * 4), ...].
        """
        logits = [self.cls(_through(self.cls_tower, x)) for x in levels]
        return logits, [self.reg(_through(self.reg_tower, x)) for x in levels]


def _through(tower: nnx.List, x: jax.Array) -> jax.Array:
    for conv in tower:
        x = nnx.relu(conv(x))
    return x
