"""Official names of MambaVision's parameters.

Source: the ``state_dict`` of ``MambaVision`` in NVlabs/MambaVision, ``mambavision/models/mamba_vision.py`` at 7860a50,
and of ``MM_mamba_vision`` in ``object_detection/tools/mamba_vision.py`` for the out norms.
"""

from evmamba_jax.models.mambavision import MambaVision
from evmamba_jax.weights.layers import (
    CONV,
    CONV1D,
    LINEAR,
    MLP,
    SAME,
    Row,
    batch_norm,
    below,
    kernel,
    layer_norm,
    out_norms,
    s6_alone,
)

OURS_ALONE = {
    "ssm": "s6",
    "ssm_bidirectional": False,
    "downsample": "conv",
    "pool": "mean",
    "conv_block": "mambavision",
    "stem": "conv",
    "stem_norm": "batch",
}

STEM = [
    *kernel("conv1", "conv_down.0", CONV),
    *batch_norm("norm1", "conv_down.1"),
    *kernel("conv2", "conv_down.3", CONV),
    *batch_norm("norm2", "conv_down.4"),
]

CONV_BLOCK = [
    *kernel("conv1", "conv1", CONV),
    *batch_norm("norm1", "norm1"),
    *kernel("conv2", "conv2", CONV),
    *batch_norm("norm2", "norm2"),
]

MIXER = [
    *kernel("in_proj", "in_proj", LINEAR),
    *kernel("conv_x", "conv1d_x", CONV1D),
    *kernel("conv_z", "conv1d_z", CONV1D),
    *s6_alone("scan"),
    *kernel("out_proj", "out_proj", LINEAR),
]

ATTENTION = [*kernel("qkv", "qkv", LINEAR), *kernel("proj", "proj", LINEAR)]

# A block has the rows of one of the two mixers.
BLOCK = [
    *layer_norm("norm", "norm1"),
    *below("mixer", "mixer", [*MIXER, *ATTENTION]),
    Row("gamma_1", "gamma_1", SAME),
    *layer_norm("norm2", "norm2"),
    *below("mlp", "mlp", MLP),
    Row("gamma_2", "gamma_2", SAME),
]

DOWNSAMPLE = kernel("downsample", "downsample.reduction.0", CONV)


def stage(block: list[Row], depth: int) -> list[Row]:
    """Return the rows of a stage of ``depth`` blocks that have the rows ``block``."""
    return [row for j in range(depth) for row in below(f"blocks.{j}", f"blocks.{j}", block)] + DOWNSAMPLE


def table(model: MambaVision) -> list[Row]:
    """Return the rows of a whole model."""
    rows = below("patch_embed", "patch_embed", STEM)
    for i, ours in enumerate(model.stages):
        rows += below(f"stages.{i}", f"levels.{i}", stage(CONV_BLOCK if i < 2 else BLOCK, len(ours.blocks)))
    return [*rows, *batch_norm("norm", "norm"), *kernel("head", "head", LINEAR), *out_norms()]
