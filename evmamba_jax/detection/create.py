"""Detectors by name, over any backbone."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from flax import nnx
from flax.typing import Dtype

from evmamba_jax.detection import mask_rcnn, rcnn, retinanet, vim_cascade
from evmamba_jax.errors import UserError, one_of
from evmamba_jax.heads.backbone import build_backbone

# By name the class, and what makes its anchors of the side of the smallest square one.
DETECTORS = {
    "retinanet": (retinanet.RetinaNet, retinanet.anchors_of),
    "mask_rcnn": (mask_rcnn.MaskRCNN, rcnn.anchors_of),
    "cascade_mask_rcnn": (mask_rcnn.CascadeMaskRCNN, rcnn.anchors_of),
    "vim_cascade": (vim_cascade.VimCascade, vim_cascade.anchors_of),
}


def create_detector(
    name: str,
    *,
    backbone: str,
    num_classes: int = 80,
    pretrained: str | PathLike[str] | None = None,
    ema: bool | Literal["better"] = "better",
    width: int = 256,
    octave_base_scale: float | None = None,
    fc_width: int | None = None,
    regions: int | None = None,
    proposals: int | None = None,
    init_std: float = 0.01,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs | None = None,
    backbone_options: Mapping[str, Any] | None = None,
) -> Any:
    """Build a detector in evaluation mode, with the official initial values or with the weights of a place.

    No weights of RetinaNet over EfficientVMamba are released. The sizes that its paper gives fit a ``width`` of 256 for
    B, and of about 208 and 224 for T and S.

    Args:
        name: "retinanet", "mask_rcnn", "cascade_mask_rcnn" or "vim_cascade"; all but the first learn from masks and
            find some. The last is Vim's, and takes backbones of one map size alone.
        backbone: one of :func:`evmamba_jax.list_models`. It is built with a norm for each of its four maps, as the
            official detectors have it; of Vim under any but its own, as its segmenters have it. MambaVision takes the
            windows of its detectors, Vim under "vim_cascade" a rotary embedding and images of 1024 pixels, unless
            ``backbone_options`` say otherwise.
        num_classes: of objects; there is no background among them.
        pretrained: a place as :func:`evmamba_jax.create_model` takes it, of a whole detector's weights, or of a
            classifier's, which fill the backbone alone. ``official`` is the released classifier.
        ema: of a run as ``pretrained``, as :func:`evmamba_jax.create_model` takes it.
        width: channels of pyramid and convolutions.
        octave_base_scale: side of the smallest square anchor of a level, in strides; less finds smaller objects. None
            is the official one: 4 of RetinaNet, 8 of the others.
        fc_width: of detectors with regions, and so the next two: channels of the box heads; None is the official 1024.
        regions: of an image that losses are taken of, 4 or more; a quarter of them are of objects. None: 512.
        proposals: of a level and of an image. None: in training 2000 of a level and 1000 of an image, of
            "cascade_mask_rcnn" 2000; otherwise 1000.
        init_std: deviation of the initial values of RetinaNet's head, of the others' head of proposals. A narrow head
            learns sooner from more than the official 0.01: what four convolutions pass on falls with the fourth power
            of it and the square of ``width``.
        dtype: compute type, e.g. ``jnp.bfloat16``; boxes, scores, losses and statistics are float32 or wider.
        rngs: source of the initial values; ``nnx.Rngs(0)`` when not given.
        backbone_options: of the backbone (``drop_path_rate``, ``in_channels``, its sizes, ...).

    Returns:
        An NNX module with ``loss(images, objects, key=key)``, where RetinaNet needs no key, and ``detect(images)``.

    Raises:
        UserError: unknown name or option; sizes below 1; weights that are missing, damaged, or of another detector.
    """
    detector, anchors_of = one_of("detector", name, DETECTORS)
    of_regions = {"fc_width": fc_width, "regions": regions, "proposals": proposals}
    given = {option: number for option, number in of_regions.items() if number is not None}
    if given and detector.settings is None:
        raise UserError(f"{next(iter(given))} is for detectors with regions, and {name!r} has none: leave it out")
    for option, number in {"num_classes": num_classes, "width": width, **given}.items():
        least = 4 if option == "regions" else 1
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise UserError(f"{option}={number!r} is not allowed: it must be a whole number of at least {least}")
    for option, size in {"octave_base_scale": octave_base_scale, "init_std": init_std}.items():
        if size is not None and not size > 0:
            raise UserError(f"{option}={size!r} is not allowed: it must be above 0")
    rngs = nnx.Rngs(0) if rngs is None else rngs
    body = {"official": detector.body, "pyramid": detector.pyramid_of(width), "options": backbone_options}
    under = build_backbone(backbone, **body, dtype=dtype, rngs=rngs)
    anchors = anchors_of() if octave_base_scale is None else anchors_of(octave_base_scale)
    own: dict[str, Any] = {"init_std": init_std} | ({} if fc_width is None else {"fc_width": fc_width})
    if detector.settings is not None:
        own["settings"] = detector.settings.limited(regions=regions, proposals=proposals)
    model = detector(*under, num_classes, width=width, anchors=anchors, dtype=dtype, rngs=rngs, **own)
    model.eval()
    if pretrained is not None:
        # Orbax takes a second to import; only who reads weights waits for it.
        from evmamba_jax.weights.load import fill_model, load_composed

        fill_model(*load_composed(model, pretrained, f"{name} with {backbone}", backbone=backbone, ema=ema))
    return model
