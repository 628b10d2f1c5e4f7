"""UperNet over a backbone's four maps, with an FCN head beside it while it is trained.

Source: Xiao et al., UperNet (arXiv:1807.10221); VMamba's ``segmentation/configs/vssm1`` at 2ed52ea, MSVMamba's and
MambaVision's alike, Vim's ``seg/configs/vim/upernet`` at dd0358a; mmseg 1.2.2.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax import ranges
from evmamba_jax.heads.fcn import FCNHead
from evmamba_jax.heads.maps import PlainPyramid
from evmamba_jax.heads.resize import bilinear
from evmamba_jax.heads.upernet import UperHead
from evmamba_jax.layers.drop_path import fold_in
from evmamba_jax.ranges import ranged, stated
from evmamba_jax.segmentation.losses import cross_entropy, pixel_accuracy
from evmamba_jax.weights.convert import register, table
from evmamba_jax.weights.layers import Row, below
from evmamba_jax.weights.upernet import auxiliary_head, decode_head, plain_pyramid


@dataclasses.dataclass(frozen=True)
class UperNetConfig:
    """The options of UperNet's heads.

    Attributes:
        num_classes: K.
        width: channels of the head.
        aux_width: channels of the auxiliary head.
        aux_weight: of its loss; the head's weighs 1.
        dropout: probability of dropping a channel before each classifier, in training.
        init_std: deviation of the classifiers' initial values.
        dtype: compute type of the heads; logits, losses and statistics are float32 or wider.

    Raises:
        UserError: an option that cannot be.
    """

    num_classes: int = ranged(150, least=1)
    width: int = ranged(512, least=1)
    aux_width: int = ranged(256, least=1)
    aux_weight: float = ranged(0.4, least=0)
    dropout: float = ranged(0.1, least=0, below=1)
    init_std: float = ranged(0.01, above=0)
    dtype: Dtype | None = stated(None, "a floating-point type of 16 bits or more, or None", ranges.is_dtype)  # noqa: RUF009

    def __post_init__(self):
        ranges.check(self)


class UperNet(nnx.Module):
    """UperNet: ``model(images)`` gives logits at a quarter of the size, ``model.loss(images, labels)`` the loss.

    Args:
        config: the options.
        backbone: ``backbone.features(images, key=key)`` gives four maps from fine to coarse.
        channels: of each map.
        pyramid: makes maps of four sizes from a backbone that has one size.
        rngs: source of the initial values of the heads.
    """

    def __init__(
        self,
        config: UperNetConfig,
        backbone: Any,
        channels: Sequence[int],
        pyramid: PlainPyramid | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.backbone = backbone
        self.pyramid = pyramid
        head = {"dropout": config.dropout, "init_std": config.init_std, "dtype": config.dtype, "rngs": rngs}
        self.decode_head = UperHead(channels, config.num_classes, width=config.width, **head)
        self.auxiliary_head = FCNHead(channels[2], config.num_classes, width=config.aux_width, **head)

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """Return the maps that enter the heads, at 4, 8, 16 and 32 pixels: [(B, h, w, C), ...]; errors as below."""
        maps = self.backbone.features(images, key=fold_in(key, 0))
        return maps if self.pyramid is None else self.pyramid(maps)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits (B, h, w, K) at the size of the finest map, a quarter of the images'.

        Args:
            images: (B, H, W, in_channels) normalised floats.
            key: random key for drop path and dropout; needed in training mode.

        Raises:
            UserError: images that the backbone does not take.
        """
        return self.decode_head(self.features(images, key=key), key=fold_in(key, 1))

    def both(self, images: jax.Array, *, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Return the logits of the head, and those of the auxiliary head (B, h/4, w/4, K); otherwise as a call."""
        maps = self.features(images, key=key)
        return self.decode_head(maps, key=fold_in(key, 1)), self.auxiliary_head(maps[2], key=fold_in(key, 2))

    def loss(
        self,
        images: jax.Array,
        labels: jax.Array,
        *,
        class_weights: Sequence[float] = (),
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss to train with, and its parts.

        Args:
            images: (B, H, W, in_channels) normalised floats.
            labels: (B, H, W) integers from 0 to K - 1, or 255 for pixels that are ignored.
            class_weights: factors of the pixels of each class, K numbers; none: all 1.
            key: random key for drop path and dropout; needed in training mode.

        Returns:
            The sum of both cross-entropies, the auxiliary one times ``aux_weight``; and by name these two ("loss",
            "aux_loss") and the pixel accuracies of both in percent ("accuracy", "aux_accuracy"). Scalars, float32 or
            wider.
        """
        return self.loss_of(*self.both(images, key=key), labels, class_weights)

    def loss_of(
        self, logits: jax.Array, aux_logits: jax.Array, labels: jax.Array, class_weights: Sequence[float] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return what :meth:`loss` does, from the logits of both heads, which are resized to the labels' size."""
        parts = {}
        for name, weight, coarse in (("", 1.0, logits), ("aux_", self.config.aux_weight, aux_logits)):
            resized = bilinear(coarse, *labels.shape[1:])
            parts[f"{name}loss"] = weight * cross_entropy(resized, labels, class_weights=class_weights)
            parts[f"{name}accuracy"] = pixel_accuracy(resized, labels)
        return parts["loss"] + parts["aux_loss"], parts


def _table(model: UperNet) -> list[Row]:
    pyramid = below("pyramid", "backbone", plain_pyramid())
    heads = [
        *below("decode_head", "decode_head", decode_head()),
        *below("auxiliary_head", "auxiliary_head", auxiliary_head()),
    ]
    return [*below("backbone", "backbone", table(model.backbone)), *pyramid, *heads]


register(UperNet, _table)
