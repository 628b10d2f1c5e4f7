"""Official names of UperNet's heads.

Source: the ``state_dict`` of mmseg's ``EncoderDecoder`` with ``UPerHead`` and ``FCNHead`` (1.2.2), and of Vim's
``VisionMambaSeg`` in hustvl/Vim, ``seg/backbone/vim.py`` at dd0358a, for the pyramid of a plain backbone.
"""

from evmamba_jax.weights.layers import CONV, DECONV, POINTWISE, Row, batch_norm, below, conv_norm, kernel

# Arrays whose length tells an option of the segmenter, with what it is divided by.
SIZES = {
    "num_classes": ("decode_head.conv_seg.bias", 1),
    "width": ("decode_head.fpn_bottleneck.bn.weight", 1),
    "aux_width": ("auxiliary_head.convs.0.bn.weight", 1),
}


def decode_head(levels: int = 4, pools: int = 4) -> list[Row]:
    """Return the rows of an UperHead on so many maps, with so many pooled branches."""
    rows = [row for i in range(pools) for row in conv_norm(f"pooling.convs.{i}", f"psp_modules.{i}.1", POINTWISE)]
    rows += conv_norm("pooling.bottleneck", "bottleneck", CONV)
    for i in range(levels - 1):
        rows += conv_norm(f"laterals.{i}", f"lateral_convs.{i}", POINTWISE)
        rows += conv_norm(f"outputs.{i}", f"fpn_convs.{i}", CONV)
    return [*rows, *conv_norm("fuse", "fpn_bottleneck", CONV), *kernel("classifier.conv", "conv_seg", POINTWISE)]


def auxiliary_head() -> list[Row]:
    """Return the rows of an FCNHead."""
    return [*conv_norm("conv", "convs.0", CONV), *kernel("classifier.conv", "conv_seg", POINTWISE)]


def plain_pyramid() -> list[Row]:
    """Return the rows of a PlainPyramid, whose official names are in the backbone."""
    rows = []
    for i in range(2):  # the maps that any stride enlarges
        rows += below(f"enlarge.{i}", f"fpn{i + 1}", kernel("conv1", "0", DECONV))
        rows += below(f"enlarge.{i}", f"fpn{i + 1}", batch_norm("norm", "1"))
        rows += below(f"enlarge.{i}", f"fpn{i + 1}", kernel("conv2", "3", DECONV))
    return rows
