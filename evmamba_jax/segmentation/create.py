"""Segmenters by name, with initial values or with weights."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import one_of
from evmamba_jax.heads.backbone import build_backbone
from evmamba_jax.models.mambavision import MambaVisionConfig
from evmamba_jax.segmentation.upernet import UperNet, UperNetConfig

SEGMENTERS = {"upernet": UperNet}


def create_segmenter(
    name: str,
    *,
    backbone: str,
    num_classes: int = 150,
    pretrained: str | PathLike[str] | None = None,
    ema: bool | Literal["better"] = "better",
    width: int = 512,
    aux_width: int = 256,
    dropout: float = 0.1,
    init_std: float = 0.01,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs | None = None,
    backbone_options: Mapping[str, Any] | None = None,
) -> Any:
    """Build a segmenter in evaluation mode, with the official initial values or with the weights of a place.

    The backbone is the official one for segmentation: four stages with their out norms; of Vim the residual streams
    after each quarter of its blocks without class token, through a pyramid of transposed convolutions. MambaVision
    takes the windows of its segmenters unless ``window_size`` says otherwise.

    Args:
        name: "upernet".
        backbone: one of :func:`evmamba_jax.list_models`.
        num_classes: K.
        pretrained: a place as :func:`evmamba_jax.create_model` takes it, of a whole segmenter's weights, or of a
            classifier's, which fill the backbone alone. ``official`` is the released classifier.
        ema: of a run as ``pretrained``, as :func:`evmamba_jax.create_model` takes it.
        width: channels of the head. The published sizes of EfficientVMamba's segmenters, which were never released,
            fit 256 for T, 384 for S and 512 for B; the official segmenters of Vim have 192 for T and 384 for S.
        aux_width: channels of the auxiliary head.
        dropout: probability of dropping a channel before each classifier, in training.
        init_std: deviation of the classifiers' initial values. A narrow head learns sooner from more than the official
            0.01: the gradient that reaches what lies below grows with it, and with the root of ``width``.
        dtype: compute type, e.g. ``jnp.bfloat16``; logits, losses and statistics are float32 or wider.
        rngs: source of the initial values; ``nnx.Rngs(0)`` when not given.
        backbone_options: of the backbone (``drop_path_rate``, ``in_channels``, ``remat``, ...).

    Returns:
        An NNX module: ``model(images)`` gives logits (B, H/4, W/4, K), ``model.loss(images, labels)`` the loss.

    Raises:
        UserError: an unknown name or option; weights that are missing, damaged, or of another segmenter.
    """
    kind = one_of("segmenter", name, SEGMENTERS)
    heads = {"width": width, "aux_width": aux_width, "dropout": dropout, "init_std": init_std}
    config = UperNetConfig(num_classes=num_classes, **heads, dtype=dtype)
    rngs = rngs or nnx.Rngs(0)
    # The last two are windows of whole crops: 1024 pixels, of S 2560 and 1792.
    windows = (8, 8, 160, 56) if backbone == "mambavision_s" else (8, 8, 64, 32)
    official = ((MambaVisionConfig, {"window_size": windows}),)
    under = build_backbone(backbone, official=official, options=backbone_options, dtype=dtype, rngs=rngs)
    model = kind(config, *under, rngs=rngs)
    model.eval()
    if pretrained is not None:
        # Orbax takes a second to import; only who reads weights waits for it.
        from evmamba_jax.weights.load import fill_model, load_composed

        fill_model(*load_composed(model, pretrained, f"{name} with {backbone}", backbone=backbone, ema=ema))
    return model
