"""Official names of the parts that detectors put behind a backbone.

Source: the ``state_dict`` of mmdet 3.3.0's ``FPN`` and ``RetinaHead``.
"""

from evmamba_jax.weights.layers import CONV, POINTWISE, Row, kernel

# Arrays whose length tells an option of RetinaNet, with what it is divided by: nine anchors a cell.
RETINANET_SIZES = {
    "num_classes": ("bbox_head.retina_cls.bias", 9),
    "width": ("neck.lateral_convs.0.conv.bias", 1),
}


def fpn(maps: int, extra: int) -> list[Row]:
    """Return the rows of a pyramid on so many maps, with so many further convolutions, which follow in one list."""
    rows = []
    for i in range(maps):
        rows += kernel(f"laterals.{i}", f"lateral_convs.{i}.conv", POINTWISE)
        rows += kernel(f"outputs.{i}", f"fpn_convs.{i}.conv", CONV)
    for i in range(extra):
        rows += kernel(f"extra.{i}", f"fpn_convs.{maps + i}.conv", CONV)
    return rows


def retinanet_head(depth: int) -> list[Row]:
    """Return the rows of RetinaNet's head with towers of so many convolutions."""
    rows = [*kernel("cls", "retina_cls", CONV), *kernel("reg", "retina_reg", CONV)]
    for i in range(depth):
        rows += kernel(f"cls_tower.{i}", f"cls_convs.{i}.conv", CONV)
        rows += kernel(f"reg_tower.{i}", f"reg_convs.{i}.conv", CONV)
    return rows
