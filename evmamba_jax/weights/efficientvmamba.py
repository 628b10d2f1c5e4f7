"""Official names of EfficientVMamba's parameters.

Source: the ``state_dict`` of ``EfficientVSSM`` in TerryPei/EfficientVMamba,
``classification/models/vmamba_efficient.py`` at 0bc5ee2.
"""

from evmamba_jax.layers.patches import PatchEmbed, PatchMerging
from evmamba_jax.models.efficientvmamba import EfficientVMamba
from evmamba_jax.weights.layers import (
    CONV,
    LINEAR,
    PATCH_ROWS,
    POINTWISE,
    Row,
    batch_norm,
    below,
    kernel,
    layer_norm,
    out_norms,
    ss2d,
)

CHANNEL_GATE = [
    *layer_norm("norm", "norm"),
    *kernel("reduce", "global_reduce", LINEAR),
    *kernel("expand", "channel_select", LINEAR),
]

EVSS_BLOCK = [
    *layer_norm("norm", "norm"),
    *below("op", "op", ss2d(sets=4)),
    *kernel("conv_branch.dw", "conv_branch.0", CONV),
    *batch_norm("conv_branch.norm", "conv_branch.1"),
    *kernel("conv_branch.pw", "conv_branch.3", POINTWISE),
    *below("se", "se", CHANNEL_GATE),
]

INVERTED_RESIDUAL = [
    *kernel("pw1", "conv_pw.0", POINTWISE),
    *batch_norm("norm1", "conv_pw.1"),
    *kernel("dw", "conv_dw.0", CONV),
    *batch_norm("norm2", "conv_dw.1"),
    *kernel("se.reduce", "se.conv_reduce", POINTWISE),
    *kernel("se.expand", "se.conv_expand", POINTWISE),
    *kernel("pw2", "conv_pw2.0", POINTWISE),
    *batch_norm("norm3", "conv_pw2.1"),
]


def table(model: EfficientVMamba) -> list[Row]:
    """Return the rows of a whole model.

    The official stages 3 and 4 are flat: a permutation, the blocks, a permutation, and in stage 3 the downsampling.
    """
    rows = below("patch_embed", "patch_embed", PATCH_ROWS[PatchEmbed])
    for i, stage in enumerate(model.stages):
        for j in range(len(stage.blocks)):
            ours = f"stages.{i}.blocks.{j}"
            rows += (
                below(ours, f"layers.{i}.blocks.{j}", EVSS_BLOCK)
                if i < 2
                else below(ours, f"layers.{i}.{j + 1}", INVERTED_RESIDUAL)
            )
        if stage.downsample is not None:
            official = "downsample" if i < 2 else len(stage.blocks) + 2
            rows += below(f"stages.{i}.downsample", f"layers.{i}.{official}", PATCH_ROWS[PatchMerging])
    return [*rows, *layer_norm("norm", "classifier.norm"), *kernel("head", "classifier.head", LINEAR), *out_norms()]
