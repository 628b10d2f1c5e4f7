"""Official names of Vim's parameters.

Source: the ``state_dict`` of ``VisionMamba`` in hustvl/Vim, ``vim/models_mamba.py`` at dd0358a.
"""

import numpy as np

from evmamba_jax.models.vim import Grid, Vim, rotary_angles
from evmamba_jax.weights.layers import CONV, CONV1D, LINEAR, SAME, Row, below, kernel, s6_alone

MIXER = [
    *kernel("in_proj", "in_proj", LINEAR),
    *kernel("forward.conv", "conv1d", CONV1D),
    *s6_alone("forward.scan"),
    *kernel("backward.conv", "conv1d_b", CONV1D),
    *s6_alone("backward.scan", "_b", "A_b_log"),
    *kernel("out_proj", "out_proj", LINEAR),
]

BLOCK = [Row("norm.scale", "norm.weight", SAME), *below("mixer", "mixer", MIXER)]


def blocks(ours: str, depth: int) -> list[Row]:
    """Return the rows of ``depth`` blocks in a row."""
    return [row for i in range(depth) for row in below(f"{ours}{i}", f"layers.{i}", BLOCK)]


def table(model: Vim) -> list[Row]:
    """Return the rows of a whole model."""
    return [
        Row("cls_token", "cls_token", SAME),
        Row("pos_embed", "pos_embed", SAME),
        *kernel("patch_embed", "patch_embed.proj", CONV),
        *blocks("blocks.", len(model.blocks)),
        Row("norm.scale", "norm_f.weight", SAME),
        *kernel("head", "head", LINEAR),
    ]


def buffers(model: Vim) -> dict[str, np.ndarray]:
    """Return what the official model keeps beside its weights, and ours computes: the tables of a rotary embedding."""
    if not model.config.rope:
        return {}
    rows, columns = model.config.grid
    angles = rotary_angles(Grid(rows, columns, None), model.config.width, np.float32)
    angles = np.repeat(np.asarray(angles).reshape(-1, model.config.width // 2), 2, axis=-1)
    return {"rope.freqs_cos": np.cos(angles), "rope.freqs_sin": np.sin(angles)}
