"""Official names of the parts that detectors put behind a backbone.

Source: the ``state_dict`` of mmdet 3.3.0's ``FPN``, ``RetinaHead``, ``RPNHead``, ``ConvFCBBoxHead`` and
``FCNMaskHead``.
"""

from evmamba_jax.weights.layers import CONV, DECONV, LINEAR, POINTWISE, Layout, Row, conv_norm, kernel

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


def rpn_head() -> list[Row]:
    """Return the rows of an RPNHead."""
    return [
        *kernel("conv", "rpn_conv", CONV),
        *kernel("cls", "rpn_cls", POINTWISE),
        *kernel("reg", "rpn_reg", POINTWISE),
    ]


def box_head(size: int, convs: int, fcs: int) -> list[Row]:
    """Return the rows of a BoxHead for regions of this side, with so many layers."""
    rows = [row for i in range(convs) for row in conv_norm(f"convs.{i}", f"shared_convs.{i}", CONV)]
    flat = Layout("o (c h w)", "(h w c) o", {"h": size, "w": size})
    for i in range(fcs):
        rows += kernel(f"fcs.{i}", f"shared_fcs.{i}", LINEAR if i else flat)
    return [*rows, *kernel("cls", "fc_cls", LINEAR), *kernel("reg", "fc_reg", LINEAR)]


def mask_head(depth: int) -> list[Row]:
    """Return the rows of a MaskHead of so many convolutions."""
    rows = [row for i in range(depth) for row in kernel(f"convs.{i}", f"convs.{i}.conv", CONV)]
    return [*rows, *kernel("upsample", "upsample", DECONV), *kernel("logits", "conv_logits", POINTWISE)]
