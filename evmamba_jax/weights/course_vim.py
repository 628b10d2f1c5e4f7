"""Names that the course project's notebooks give the parameters of its model.

Source: the ``state_dict`` of ``Vim`` in rdaggs/vim_ssm_cv24 at d2ae6c4, ``vision_mamba/*_vim.ipynb``, which the files
``SE_vim.pt`` and ``DynamicPruning_vim.pt`` beside them hold.
"""

from evmamba_jax.models.course_vim import CourseVim
from evmamba_jax.weights.layers import (
    CONV1D,
    LINEAR,
    POINTWISE1D,
    SAME,
    Row,
    batch_norm,
    below,
    kernel,
    layer_norm,
    s6_alone,
)

INVERTED_RESIDUAL = [
    *kernel("pw1", "expand_conv", POINTWISE1D),
    *batch_norm("norm1", "expand_bn"),
    *kernel("dw", "depthwise_conv", CONV1D),
    *batch_norm("norm2", "depthwise_bn"),
    *kernel("pw2", "project_conv", POINTWISE1D),
    *batch_norm("norm3", "project_bn"),
]


def convolution(ours: str, official: str) -> list[Row]:
    """Return the rows of the layer before a scan, of which a model has either kind."""
    return [
        *kernel(ours, f"{official}_conv1d", POINTWISE1D),
        *below(ours, f"{official}_conv", INVERTED_RESIDUAL),
    ]


BLOCK = [
    *layer_norm("norm", "norm"),
    *kernel("mixer.proj", "proj", LINEAR),
    *convolution("mixer.conv1", "forward"),
    *convolution("mixer.conv2", "backward"),
    *below("mixer", "ssm", s6_alone("scan", x_proj="deltaBC_layer", dt_proj="dt_proj_layer")),
    *kernel("mixer.se.reduce", "se.fc1", LINEAR),
    *kernel("mixer.se.expand", "se.fc2", LINEAR),
]


def table(model: CourseVim) -> list[Row]:
    """Return the rows of a whole model."""
    return [
        Row("cls_token", "cls_token", SAME),
        *kernel("patch_embed", "to_patch_embedding.1", LINEAR),
        *(row for i in range(len(model.blocks)) for row in below(f"blocks.{i}", f"layers.{i}", BLOCK)),
        *layer_norm("norm", "output_head.1"),
        *kernel("head", "output_head.2", LINEAR),
    ]
