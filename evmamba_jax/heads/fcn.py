"""The head of a fully convolutional network, which segmenters train beside their own on an earlier map.

Source: Long et al., Fully Convolutional Networks for Semantic Segmentation (arXiv:1411.4038); mmseg 1.2.2
``models/decode_heads/fcn_head.py`` with one convolution and ``concat_input=False``.
"""

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.heads.conv import ConvNormReLU, PixelClassifier


class FCNHead(nnx.Module):
    """A 3x3 convolution with norm and ReLU, and the classifier.

    Args:
        in_channels: channels C of the map.
        num_classes: K.
        width: channels between.
        dropout: probability of dropping a channel before the classifier, in training.
        init_std: of the classifier, see there.
        dtype: compute type; logits and statistics are float32 or wider.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        init_std: float = 0.01,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv = ConvNormReLU(in_channels, width, 3, dtype=dtype, rngs=rngs)
        self.classifier = PixelClassifier(width, num_classes, dropout=dropout, init_std=init_std, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits (B, H, W, K) of a map (B, H, W, C); ``key`` draws the dropout in training mode."""
        return self.classifier(self.conv(x), key)
