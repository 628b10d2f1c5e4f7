"""Low-rank adaptation: a matrix W that stays as it is, plus a product of two thin ones that is trained.

The thin matrices lie beside W among the parameters, so they shard, average, save and resume as all parameters do. A
model knows nothing of them: whoever builds one from parameters takes :func:`merged` ones.

Source: Hu et al., LoRA (arXiv:2106.09685); initial values as in Hugging Face's peft.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evmamba_jax.errors import UserError

_A, _B, _SCALE = ".lora_a", ".lora_b", ".lora_scale"


def is_added(name: str) -> bool:
    """Return whether a parameter is one of the two thin matrices, which are trained."""
    return name.endswith((_A, _B))


def matrices(params: Mapping[str, Any]) -> list[str]:
    """Return which parameters are matrices of linear layers: kernels (I, O), and a scan's ``x_proj`` (K, I, O)."""
    return [
        name
        for name, array in params.items()
        if (name.endswith("kernel") and len(array.shape) == 2) or (name.endswith("x_proj") and len(array.shape) == 3)
    ]


def added(params: Mapping[str, Any], names: Sequence[str], *, rank: int, alpha: float, seed: int) -> dict[str, Any]:
    """Return parameters with thin matrices beside some; the model computes as before until these are trained.

    Args:
        params: by path.
        names: of matrices W (..., I, O).
        rank: R; ``lora_a`` is (..., I, R), uniform within 1/sqrt(I), and ``lora_b`` (..., R, O), zero.
        alpha: W becomes W + alpha / R * a @ b.
        seed: of the initial values.
    """
    rng = np.random.default_rng(seed)
    out = dict(params)
    for name in names:
        *sets, inputs, outputs = params[name].shape
        bound = 1 / math.sqrt(inputs)
        out[name + _A] = rng.uniform(-bound, bound, (*sets, inputs, rank)).astype(np.float32)
        out[name + _B] = np.zeros((*sets, rank, outputs), np.float32)
        out[name + _SCALE] = np.float32(alpha / rank)
    return out


def merged(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as a model has them: every W with the product of its thin matrices added, and none beside."""
    out = {name: array for name, array in params.items() if not name.endswith((_A, _B, _SCALE))}
    for name in out:
        if name + _A in params:
            product = params[name + _A] @ params[name + _B]
            out[name] = (params[name] + params[name + _SCALE] * product).astype(params[name].dtype)
    return out


def chosen(params: Mapping[str, Any], patterns: Sequence[str]) -> list[str]:
    """Return the matrices whose paths match one of the patterns; raises a UserError for a pattern that none matches."""
    names = matrices(params)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"config.tune.lora_targets has {pattern!r}, which is the path of no linear layer; there are, among "
                f"others, {', '.join(sorted({name.split('.', 3)[-1] for name in names})[:6])}: write e.g. '*.in_proj.*'"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
