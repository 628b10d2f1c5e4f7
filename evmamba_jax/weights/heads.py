"""Official names of the parts that detectors put behind a backbone.

Source: the ``state_dict`` of mmdet 3.3.0's detectors, which the official repositories train.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from evmamba_jax.heads.fpn import FPN
from evmamba_jax.heads.retinanet import RetinaNetHead
from evmamba_jax.weights.layers import CONV, POINTWISE, Row, below, kernel


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


class _Part(NamedTuple):
    """The official name of a part, and what makes its rows."""

    name: str
    rows: Callable[[Any], list[Row]]


_PARTS: Mapping[type[nnx.Module], _Part] = {
    FPN: _Part("neck", fpn),
    RetinaNetHead: _Part("bbox_head", retinanet),
}


def table(model: nnx.Module) -> list[Row]:
    """Return the rows of those parts of a detector that are not its backbone."""
    rows = []
    for name, part in vars(model).items():
        if type(part) in _PARTS:
            official, rows_of = _PARTS[type(part)]
            rows += below(name, official, rows_of(part))
    return rows
