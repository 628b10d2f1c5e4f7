"""How official code names and lays out the parameters of the layers that several families share.

A table is a list of rows (our path, official name, layout). It follows the names of our parameters, so one table serves
both directions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from einops import rearrange


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
POINTWISE = Layout("o i 1 1", "i o")  # a 1x1 convolution there, a matrix product over channels here


def below(ours: str, official: str, rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` of a submodule that has these two names in its parent."""
    return [Row(f"{ours}.{row.ours}", f"{official}.{row.official}", row.layout) for row in rows]


def kernel(ours: str, official: str, layout: Layout, *, bias: bool = True) -> list[Row]:
    """Return the rows of a linear layer or convolution."""
    rows = [Row("kernel", "weight", layout), Row("bias", "bias", SAME)]
    return below(ours, official, rows if bias else rows[:1])


def layer_norm(ours: str, official: str) -> list[Row]:
    """Return the rows of a LayerNorm."""
    return below(ours, official, [Row("scale", "weight", SAME), Row("bias", "bias", SAME)])


def batch_norm(ours: str, official: str) -> list[Row]:
    """Return the rows of a BatchNorm, its running statistics included."""
    statistics = below(ours, official, [Row("mean", "running_mean", SAME), Row("var", "running_var", SAME)])
    return layer_norm(ours, official) + statistics


def ss2d(directions: int) -> list[Row]:
    """Return the rows of a gated SS2D; the official A_logs and Ds are flat with the direction first."""
    k = {"k": directions}
    return [
        *kernel("in_proj", "in_proj", LINEAR, bias=False),
        *kernel("conv2d", "conv2d", CONV),
        Row("x_proj_weight", "x_proj_weight", Layout("k c e", "k e c")),
        Row("dt_proj_weight", "dt_projs_weight", Layout("k e r", "k r e")),
        Row("dt_proj_bias", "dt_projs_bias", SAME),
        Row("A_log", "A_logs", Layout("(k e) n", "k e n", k)),
        Row("D", "Ds", Layout("(k e)", "k e", k)),
        *layer_norm("out_norm", "out_norm"),
        *kernel("out_proj", "out_proj", LINEAR, bias=False),
    ]


def patch_merging() -> list[Row]:
    """Return the rows of the downsampling "v1"."""
    return [*layer_norm("norm", "norm"), *kernel("reduction", "reduction", LINEAR, bias=False)]
