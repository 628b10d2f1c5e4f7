"""Mask R-CNN and Cascade Mask R-CNN as mmdet builds them, on a feature pyramid.

Source: He et al., Mask R-CNN (arXiv:1703.06870); Cai and Vasconcelos, Cascade R-CNN (arXiv:1906.09756); mmdet 3.3.0.
"""

import functools

from evmamba_jax.detection.boxes import DeltaCoder
from evmamba_jax.detection.detector import with_backbone
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.proposals import Limits, Rules
from evmamba_jax.detection.rcnn import BOX_SIZE, RCNN, Heads, Settings
from evmamba_jax.detection.rounds import Round
from evmamba_jax.heads.rcnn import BoxHead
from evmamba_jax.weights.convert import register
from evmamba_jax.weights.detectors import box_head, fpn, mask_head, rpn_head
from evmamba_jax.weights.layers import Row, below


class MaskRCNN(RCNN):
    """Mask R-CNN, in one round.

    Settings are mmdet's ``configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py``, on which the detectors of
    EfficientVMamba, VMamba and MSVMamba are built.
    """

    rounds = (Round(DeltaCoder((0.1, 0.1, 0.2, 0.2)), Matcher(positive=0.5, negative=0.5, minimum=0.5)),)


def _round(overlap: float, weight: float, *stds: float) -> Round:
    return Round(DeltaCoder(stds), Matcher(positive=overlap, negative=overlap, minimum=None), weight, giou=10.0)


class CascadeMaskRCNN(RCNN):
    """Cascade Mask R-CNN, in three rounds that ask for more and more overlap.

    Settings are those of MambaVision's ``object_detection/configs/mamba_vision`` at 7860a50.
    """

    rounds = (
        _round(0.5, 1.0, 0.1, 0.1, 0.2, 0.2),
        _round(0.6, 0.5, 0.05, 0.05, 0.1, 0.1),
        _round(0.7, 0.25, 0.033, 0.033, 0.067, 0.067),
    )
    rules = Rules(beta=1 / 9, trained="within")
    settings = Settings(trained=Limits(2000, 2000))
    masked = 3
    heads = Heads(box=functools.partial(BoxHead, convs=4, fcs=1))


def head_rows(model: RCNN) -> list[Row]:
    """Return the official names of pyramid and heads, as mmdet's checkpoints have them."""
    rows = below("neck", "neck", fpn(len(model.neck.laterals), len(model.neck.extra)))
    rows += below("rpn", "rpn_head", rpn_head())
    for i, (boxes, masks) in enumerate(zip(model.box_heads, model.mask_heads, strict=True)):
        number = f".{i}" if len(model.rounds) > 1 else ""
        layers = box_head(BOX_SIZE, len(boxes.convs), len(boxes.fcs))
        rows += below(f"box_heads.{i}", f"roi_head.bbox_head{number}", layers)
        rows += below(f"mask_heads.{i}", f"roi_head.mask_head{number}", mask_head(len(masks.convs)))
    return rows


for _kind in (MaskRCNN, CascadeMaskRCNN):
    register(_kind, lambda model: with_backbone(model, head_rows(model)))
