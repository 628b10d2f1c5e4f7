"""How official code names and lays out the parameters of the layers that several families share.

A table is a list of rows (our path, official name, layout). It follows the names of our parameters, so one table serves
both directions. A row for a parameter that a variant does not have, a bias for instance, is passed over.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from einops import rearrange
from flax import nnx

from evmamba_jax.layers.backbone import StagedBackbone
from evmamba_jax.layers.patches import ConvDownsample, OverlapPatchEmbed, PatchEmbed, PatchMerging


@dataclass(frozen=True)
class Layout:
    """The axes of one parameter in the official file and in ours, as the two sides of an einops pattern."""

    official: str
    ours: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Rearrange an official array into our layout."""
        return rearrange(array, f"{self.official} -> {self.ours}", **self.sizes)

    def to_official(self, array: np.ndarray) -> np.ndarray:
        """Rearrange one of our arrays into the official layout."""
        return rearrange(array, f"{self.ours} -> {self.official}", **self.sizes)


class Row(NamedTuple):
    """One parameter: our path, the official name, and both layouts."""

    ours: str
    official: str
    layout: Layout


SAME = Layout("...", "...")
LINEAR = Layout("o i", "i o")
CONV = Layout("o i h w", "h w i o")
DECONV = Layout("i o h w", "h w i o")  # a transposed convolution
CONV1D = Layout("o i k", "k i o")
POINTWISE = Layout("o i 1 1", "i o")  # a 1x1 convolution there, a matrix product over channels here
POINTWISE1D = Layout("o i 1", "i o")


def below(ours: str, official: str, rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` of a submodule that has these two names in its parent."""
    return [Row(f"{ours}.{row.ours}", f"{official}.{row.official}", row.layout) for row in rows]


def kernel(ours: str, official: str, layout: Layout) -> list[Row]:
    """Return the rows of a linear layer or convolution."""
    return below(ours, official, [Row("kernel", "weight", layout), Row("bias", "bias", SAME)])


def layer_norm(ours: str, official: str) -> list[Row]:
    """Return the rows of a LayerNorm."""
    return below(ours, official, [Row("scale", "weight", SAME), Row("bias", "bias", SAME)])


def batch_norm(ours: str, official: str) -> list[Row]:
    """Return the rows of a BatchNorm, its running statistics included."""
    statistics = below(ours, official, [Row("mean", "running_mean", SAME), Row("var", "running_var", SAME)])
    return layer_norm(ours, official) + statistics


def conv_norm(ours: str, official: str, layout: Layout) -> list[Row]:
    """Return the rows of a convolution with its BatchNorm."""
    return below(ours, official, [*kernel("conv", "conv", layout), *batch_norm("norm", "bn")])


def s6(ours: str, sets: int) -> list[Row]:
    """Return the rows of an S6 whose sets the official code stacks; its A_logs and Ds are flat with the set first."""
    k = {"k": sets}
    return [
        Row(f"{ours}.x_proj", "x_proj_weight", Layout("k c e", "k e c")),
        Row(f"{ours}.dt_proj", "dt_projs_weight", Layout("k e r", "k r e")),
        Row(f"{ours}.dt_bias", "dt_projs_bias", SAME),
        Row(f"{ours}.A_log", "A_logs", Layout("(k e) n", "k e n", k)),
        Row(f"{ours}.D", "Ds", Layout("(k e)", "k e", k)),
    ]


def s6_alone(
    ours: str, suffix: str = "", a_log: str = "A_log", *, x_proj: str = "x_proj", dt_proj: str = "dt_proj"
) -> list[Row]:
    """Return the rows of an S6 of one set that the official code keeps as layers, named with a ``suffix``."""
    return [
        Row(f"{ours}.x_proj", f"{x_proj}{suffix}.weight", Layout("c e", "1 e c")),
        Row(f"{ours}.dt_proj", f"{dt_proj}{suffix}.weight", Layout("e r", "1 r e")),
        Row(f"{ours}.dt_bias", f"{dt_proj}{suffix}.bias", Layout("e", "1 e")),
        Row(f"{ours}.A_log", a_log, Layout("e n", "1 e n")),
        Row(f"{ours}.D", f"D{suffix}", Layout("e", "1 e")),
    ]


def ss2d(sets: int) -> list[Row]:
    """Return the rows of an SS2D."""
    return [
        *kernel("in_proj", "in_proj", LINEAR),
        *kernel("conv2d", "conv2d", CONV),
        *s6("scan", sets),
        *layer_norm("out_norm", "out_norm"),
        *kernel("out_proj", "out_proj", LINEAR),
    ]


MLP = [*kernel("fc1", "fc1", LINEAR), *kernel("fc2", "fc2", LINEAR)]

# The stems and downsamplings of the VMamba line, by the class that has them.
PATCH_ROWS: Mapping[type[nnx.Module], list[Row]] = {
    PatchEmbed: [*kernel("proj", "0", CONV), *layer_norm("norm", "2")],
    OverlapPatchEmbed: [
        *kernel("conv1", "0", CONV),
        *layer_norm("norm1", "2"),
        *kernel("conv2", "5", CONV),
        *layer_norm("norm2", "7"),
    ],
    PatchMerging: [*layer_norm("norm", "norm"), *kernel("reduction", "reduction", LINEAR)],
    ConvDownsample: [*kernel("conv", "1", CONV), *layer_norm("norm", "3")],
}


def staged(model: StagedBackbone, block: list[Row]) -> list[Row]:
    """Return the rows of a model of the VMamba line whose blocks all have the rows ``block``."""
    rows = below("patch_embed", "patch_embed", PATCH_ROWS[type(model.patch_embed)])
    for i, stage in enumerate(model.stages):
        for j in range(len(stage.blocks)):
            rows += below(f"stages.{i}.blocks.{j}", f"layers.{i}.blocks.{j}", block)
        if stage.downsample is not None:
            rows += below(f"stages.{i}.downsample", f"layers.{i}.downsample", PATCH_ROWS[type(stage.downsample)])
    return [*rows, *layer_norm("norm", "classifier.norm"), *kernel("head", "classifier.head", LINEAR), *out_norms()]


def out_norms() -> list[Row]:
    """Return the rows of the norms that detection and segmentation backbones have."""
    return [row for i in range(4) for row in layer_norm(f"out_norms.{i}", f"outnorm{i}")]
