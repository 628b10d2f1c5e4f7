"""Which part of a training step an operation belongs to, told by the chain of calls that made it.

The same chains are in traced programs (``equation.source_info``) and in compiled ones
(:meth:`evmamba_jax.preflight.hlo.Program.chain`), so that one rule serves both.
"""

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

from evmamba_jax.preflight.hlo import Program

PARTS = (
    "augmentation",
    "stem",  # patches, and the downsampling between stages
    "norms",
    "projections",  # of blocks, with their gates, sums and drop path
    "depthwise",
    "scans",
    "squeeze-excite",
    "MLP",
    "attention",
    "head",  # and the loss
    "optimizer",
    "other",
)

# The end of a file's path, or a folder in it, and what a call in it says. The innermost call that says something
# counts; files that are not here say nothing, as what calls them decides.
_FILES = {
    "flax/nnx/nn/normalization.py": "norms",
    "evmamba_jax/layers/norm.py": "norms",
    "evmamba_jax/layers/projections.py": "depthwise",  # its other layers are flax's, which leave no call of this file
    "evmamba_jax/layers/s4d.py": "scans",
    "evmamba_jax/layers/s5.py": "scans",
    "evmamba_jax/layers/s6.py": "scans",
    "pallas_kernels/": "scans",
    "evmamba_jax/layers/squeeze_excite.py": "squeeze-excite",
    "evmamba_jax/layers/mlp.py": "MLP",
    "evmamba_jax/layers/inverted_residual.py": "MLP",
    "evmamba_jax/layers/attention.py": "attention",
    "evmamba_jax/layers/attention_pool.py": "head",
    "evmamba_jax/layers/sliding_window.py": "attention",
    "evmamba_jax/layers/patches.py": "stem",
    "evmamba_jax/layers/blocks.py": "projections",  # the call of a block
    "evmamba_jax/heads/": "head",
    "evmamba_jax/segmentation/": "head",
    "evmamba_jax/detection/": "head",
    "evmamba_jax/data/": "augmentation",
    "site-packages/optax/": "optimizer",
    "evmamba_jax/training/": "optimizer",
}
# The same for single functions of files that do several things.
_FUNCTIONS = {
    ("evmamba_jax/layers/backbone.py", "features"): "stem",
    ("evmamba_jax/layers/backbone.py", "__call__"): "head",
    ("evmamba_jax/models/vim.py", "tokens"): "stem",
    ("evmamba_jax/models/course_vim.py", "tokens"): "stem",
    ("evmamba_jax/tasks/", "inputs"): "augmentation",
    ("evmamba_jax/tasks/", "loss"): "head",
}


def part_of(frames: Iterable[tuple[str, int]]) -> str:
    """Return the part, one of ``PARTS``, from file and line of every call that led to an operation, innermost first."""
    return next((part for part in (_says(*frame) for frame in frames) if part), "other")


def instruction_parts(program: Program) -> dict[str, str]:
    """Return the part of every instruction of a compiled program, by its name.

    A fusion belongs whole to what its result is part of. What the compiler has added, such as a copy, says nothing of
    where it comes from: it belongs to what makes its first known argument, or else to what uses its result.
    """
    parts: dict[str, str] = {}
    for inside in program.computations.values():
        for one in inside:
            parts[one.name] = part_of(program.chain(one))
            if parts[one.name] == "other":
                parts[one.name] = next(
                    (parts[name] for name in one.operands if parts.get(name, "other") != "other"), "other"
                )
        for one in reversed(inside):
            for name in one.operands if parts[one.name] != "other" else ():
                if parts.get(name) == "other":
                    parts[name] = parts[one.name]
    return parts


@functools.cache
def _says(file: str, line: int) -> str | None:
    """Return what one call says of the part; None where it says nothing."""
    for place, part in _FILES.items():
        if file.endswith(place) or (place.endswith("/") and f"/{place}" in file):
            return part
    for (place, function), part in _FUNCTIONS.items():
        there = file.endswith(place) or (place.endswith("/") and f"/{place}" in file)
        if there and _function(file, line) == function:
            return part
    return None


@functools.cache
def _function(file: str, line: int) -> str:
    """Return the name of the innermost function or method around a line; empty where there is none."""
    around = [one for one in _functions(file) if one.lineno <= line <= (one.end_lineno or one.lineno)]
    return max(around, key=lambda one: one.lineno).name if around else ""


@functools.cache
def _functions(file: str) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(Path(file).read_text())
    except OSError:  # of a program that was made on another machine
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
