"""Official names of the parts that detectors put behind a backbone.

Source: the ``state_dict`` of mmdet 3.3.0's ``FPN``, ``RetinaHead``, ``RPNHead``, ``ConvFCBBoxHead`` and
``FCNMaskHead``, and of Detectron2's parts of Vim's detector in hustvl/Vim, ``det`` at dd0358a.
"""

from evmamba_jax.weights.layers import CONV, DECONV, LINEAR, POINTWISE, Layout, Row, conv_norm, kernel, layer_norm

# Arrays whose length tells an option of RetinaNet, with what it is divided by: nine anchors a cell.
RETINANET_SIZES = {
    "num_classes": ("bbox_head.retina_cls.bias", 9),
    "width": ("neck.lateral_convs.0.conv.bias", 1),
}


def rcnn_sizes(number: str = "") -> dict[str, tuple[str, int]]:
    """Return the same of R-CNNs; ``number`` is that of a round, as ``".0"``, where there are several."""
    return {
        "num_classes": (f"roi_head.mask_head{number}.conv_logits.bias", 1),
        "width": ("neck.lateral_convs.0.conv.bias", 1),
        "fc_width": (f"roi_head.bbox_head{number}.shared_fcs.0.bias", 1),
    }


# The same of Vim's detector.
VIM_SIZES = {
    "num_classes": ("roi_heads.mask_head.predictor.bias", 1),
    "width": ("backbone.simfp_2.5.norm.bias", 1),
    "fc_width": ("roi_heads.box_head.0.fc1.bias", 1),
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
        *kernel("convs.0", "rpn_conv", CONV),
        *kernel("cls", "rpn_cls", POINTWISE),
        *kernel("reg", "rpn_reg", POINTWISE),
    ]


def box_head(size: int, convs: int, fcs: int) -> list[Row]:
    """Return the rows of a BoxHead for regions of this side, with so many layers."""
    rows = [row for i in range(convs) for row in conv_norm(f"convs.{i}", f"shared_convs.{i}", CONV)]
    for i in range(fcs):
        rows += kernel(f"fcs.{i}", f"shared_fcs.{i}", LINEAR if i else _flat(size))
    return [*rows, *kernel("cls", "fc_cls", LINEAR), *kernel("reg", "fc_reg", LINEAR)]


def _flat(size: int) -> Layout:
    """Return the layout of the first fully connected layer, which reads regions of this side."""
    return Layout("o (c h w)", "(h w c) o", {"h": size, "w": size})


def mask_head(depth: int) -> list[Row]:
    """Return the rows of a MaskHead of so many convolutions."""
    rows = [row for i in range(depth) for row in kernel(f"convs.{i}", f"convs.{i}.conv", CONV)]
    return [*rows, *kernel("upsample", "upsample", DECONV), *kernel("logits", "conv_logits", POINTWISE)]


def _conv_ln(ours: str, official: str, layout: Layout) -> list[Row]:
    """Return the rows of a ConvNorm with a LayerNorm, which is one layer in Detectron2."""
    return [Row(f"{ours}.conv.kernel", f"{official}.weight", layout), *layer_norm(f"{ours}.norm", f"{official}.norm")]


def simple_pyramid(stride: int) -> list[Row]:
    """Return the rows of a SimplePyramid on a map of this stride, whose official names are in the backbone."""
    rows = []
    for i, wanted in enumerate((4, 8, 16, 32)):
        ours, official = f"levels.{i}", f"simfp_{i + 2}"
        rows += kernel(f"{ours}.enlarge.conv1", f"{official}.0", DECONV)
        rows += layer_norm(f"{ours}.enlarge.norm", f"{official}.1")
        rows += kernel(f"{ours}.enlarge.conv2", f"{official}.3", DECONV)
        # Behind four layers, behind one that enlarges or pools, or first.
        place = 4 if 4 * wanted == stride else int(wanted != stride)
        rows += _conv_ln(f"{ours}.lateral", f"{official}.{place}", POINTWISE)
        rows += _conv_ln(f"{ours}.output", f"{official}.{place + 1}", CONV)
    return rows


def vim_heads(size: int, rounds: int) -> list[Row]:
    """Return the rows of the heads of Vim's detector: of proposals, of boxes of regions of this side, and of masks."""
    anchors, regions = "proposal_generator.rpn_head", "roi_heads"
    rows = [row for i in range(2) for row in kernel(f"rpn.convs.{i}", f"{anchors}.conv.conv{i}", CONV)]
    rows += kernel("rpn.cls", f"{anchors}.objectness_logits", POINTWISE)
    rows += kernel("rpn.reg", f"{anchors}.anchor_deltas", POINTWISE)
    for i in range(rounds):
        ours, head = f"box_heads.{i}", f"{regions}.box_head.{i}"
        rows += [row for j in range(4) for row in _conv_ln(f"{ours}.convs.{j}", f"{head}.conv{j + 1}", CONV)]
        rows += kernel(f"{ours}.fcs.0", f"{head}.fc1", _flat(size))
        rows += kernel(f"{ours}.cls", f"{regions}.box_predictor.{i}.cls_score", LINEAR)
        rows += kernel(f"{ours}.reg", f"{regions}.box_predictor.{i}.bbox_pred", LINEAR)
    ours, head = "mask_heads.0", f"{regions}.mask_head"
    rows += [row for j in range(4) for row in _conv_ln(f"{ours}.convs.{j}", f"{head}.mask_fcn{j + 1}", CONV)]
    rows += kernel(f"{ours}.upsample", f"{head}.deconv", DECONV)
    return [*rows, *kernel(f"{ours}.logits", f"{head}.predictor", POINTWISE)]
