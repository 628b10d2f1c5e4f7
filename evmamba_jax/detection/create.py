"""Detectors by name, over any backbone of four stages."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from flax import nnx
from flax.typing import Dtype

from evmamba_jax.detection.retinanet import RetinaNet, anchors_of
from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers.backbone import StagedConfig
from evmamba_jax.models.registry import build_model, configuration

DETECTORS = {"retinanet": RetinaNet}


def create_detector(
    name: str,
    *,
    backbone: str,
    num_classes: int = 80,
    pretrained: str | PathLike[str] | None = None,
    ema: bool | Literal["better"] = "better",
    width: int = 256,
    octave_base_scale: float = 4.0,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs | None = None,
    backbone_options: Mapping[str, Any] | None = None,
) -> Any:
    """Build a detector in evaluation mode, with the official initial values or with the weights of a place.

    No weights of RetinaNet over EfficientVMamba are released. The sizes that its paper gives fit a ``width`` of 256 for
    B, and of about 208 and 224 for T and S.

    Args:
        name: "retinanet".
        backbone: one of :func:`evmamba_jax.list_models` with maps of four sizes: EfficientVMamba, VMamba, MSVMamba or
            MambaVision. It is built with a norm for each map, as the official detectors have it.
        num_classes: of objects; there is no background among them.
        pretrained: a place as :func:`evmamba_jax.create_model` takes it, of a whole detector's weights, or of a
            classifier's, which fill the backbone alone. ``official`` is the released classifier.
        ema: of a run as ``pretrained``, as :func:`evmamba_jax.create_model` takes it.
        width: channels of pyramid and head.
        octave_base_scale: side of the smallest square anchor of a level, in strides; less finds smaller objects.
        dtype: compute type, e.g. ``jnp.bfloat16``; boxes, scores, losses and statistics are float32 or wider.
        rngs: source of the initial values; ``nnx.Rngs(0)`` when not given.
        backbone_options: of the backbone (``drop_path_rate``, ``in_channels``, its sizes, ...).

    Returns:
        An NNX module with ``loss(images, objects)`` and ``detect(images)``.

    Raises:
        UserError: unknown name or option; a backbone whose maps have one size; sizes below 1; weights that are missing,
            damaged, or of another detector.
    """
    detector = one_of("detector", name, DETECTORS)
    for option, number in {"num_classes": num_classes, "width": width}.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"{option}={number!r} is not allowed: it must be a whole number of at least 1")
    options = dict(backbone_options or {})
    if "out_norms" in options:
        raise UserError("option 'out_norms' of the backbone is decided by the detector: leave it out")
    config = configuration(backbone)
    if not isinstance(config, StagedConfig):
        raise UserError(
            f"backbone {backbone!r} has maps of one size, and {name} needs four: take a model of four stages, "
            "e.g. 'evmamba_t'"
        )
    rngs = nnx.Rngs(0) if rngs is None else rngs
    body = build_model(backbone, rngs=rngs, dtype=dtype, num_classes=0, out_norms=True, **options)
    widths = [norm.num_features for norm in body.out_norms]
    if not octave_base_scale > 0:
        raise UserError(f"octave_base_scale={octave_base_scale!r} is not allowed: it must be above 0")
    model = detector(
        body, widths, num_classes, width=width, anchors=anchors_of(octave_base_scale), dtype=dtype, rngs=rngs
    )
    model.eval()
    if pretrained is not None:
        # Orbax takes a second to import; only who reads weights waits for it.
        from evmamba_jax.weights.load import fill_model, load_composed

        fill_model(*load_composed(model, pretrained, f"{name} with {backbone}", backbone=backbone, ema=ema))
    return model
