"""Official names of the parts that detectors put behind a backbone.

Source: the ``state_dict`` of mmdet 3.3.0's detectors, which the official repositories train.
"""

from evmamba_jax.heads.fpn import FPN
from evmamba_jax.heads.retinanet import RetinaNetHead
from evmamba_jax.weights.layers import CONV, POINTWISE, Row, kernel


def fpn(neck: FPN) -> list[Row]:
    """Return the rows of a pyramid; its further convolutions follow those of its maps in one list."""
    rows, maps = [], len(neck.laterals)
    for i in range(maps):
        rows += kernel(f"laterals.{i}", f"lateral_convs.{i}.conv", POINTWISE)
        rows += kernel(f"outputs.{i}", f"fpn_convs.{i}.conv", CONV)
    for i in range(len(neck.extra)):
        rows += kernel(f"extra.{i}", f"fpn_convs.{maps + i}.conv", CONV)
    return rows


def retinanet(head: RetinaNetHead) -> list[Row]:
    """Return the rows of RetinaNet's head."""
    rows = [*kernel("cls", "retina_cls", CONV), *kernel("reg", "retina_reg", CONV)]
    for i in range(len(head.cls_tower)):
        rows += kernel(f"cls_tower.{i}", f"cls_convs.{i}.conv", CONV)
        rows += kernel(f"reg_tower.{i}", f"reg_convs.{i}.conv", CONV)
    return rows
