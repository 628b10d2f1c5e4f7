"""Weights and images made by a rule, the ones under which the official models gave the numbers in tests/golden.

A tensor depends only on its name and shape in the official ``state_dict``. Its randomness is the raw 64-bit stream of
PCG64 seeded with the CRC-32 of the name; all that follows is integer or plain float64 arithmetic, so the float32 result
is the same to the bit on any machine. ``digest`` proves it against the recorded SHA-256.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from math import prod, sqrt

import numpy as np

Shape = tuple[int, ...]


def weights(manifest: Mapping[str, Iterable[int]]) -> dict[str, np.ndarray]:
    """Return {official name: float32 array} for {official name: shape}, in the same order."""
    return {name: tensor(name, tuple(shape)) for name, shape in manifest.items()}


def image(shape: Iterable[int], seed: int) -> np.ndarray:
    """Return a batch of standard normal float32 images (B, H, W, C).

    Args:
        shape: of the batch in the official layout (B, C, H, W), in which the numbers are drawn.
        seed: of NumPy's default generator.
    """
    return np.random.default_rng(seed).standard_normal(tuple(shape), np.float32).transpose(0, 2, 3, 1)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names and little-endian bytes, in order."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        sha.update(name.encode())
        sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()


def tensor(name: str, shape: Shape) -> np.ndarray:
    """Return one tensor; its kind is read off the last parts of its name and its rank."""
    *path, leaf = name.split(".")
    parent = path[-1] if path else ""
    of_time_step, of_projection = parent.startswith("dt_proj"), parent.startswith("x_proj")
    match leaf:
        case "num_batches_tracked":
            return np.ones(shape, np.int64)
        case "running_var":
            values = _uniform(name, shape, 0.5, 1.5)
        case "running_mean":
            values = 0.1 * _bell(name, shape)
        case "A_logs" | "A_log" | "A_b_log":
            values = np.log(np.arange(1, shape[-1] + 1)).round(6) + 0.1 * _bell(name, shape)
        case "Ds" | "D" | "D_b":
            values = 1.0 + 0.2 * _bell(name, shape)
        case _ if leaf == "dt_projs_bias" or (of_time_step and leaf == "bias"):  # softplus of these is 0.001 to 0.1
            values = _uniform(name, shape, -6.9, -2.25)
            if path and path[0] == "levels":  # MambaVision adds this bias twice
                values = 0.5 * values
        case _ if leaf == "dt_projs_weight" or (of_time_step and leaf == "weight"):
            values = _bell(name, shape) * (0.5 / sqrt(shape[-1]))
        case _ if leaf == "x_proj_weight" or (of_projection and leaf == "weight"):
            values = _bell(name, shape) * (1.6 / sqrt(shape[-1]))
        case "gamma_1" | "gamma_2":
            values = 0.5 + 0.1 * _bell(name, shape)
        case "pos_embed":
            values = 0.2 * _bell(name, shape)
        case "cls_token":
            values = 0.5 * _bell(name, shape)
        case "weight" if len(shape) == 1:
            values = 1.0 + 0.1 * _bell(name, shape)
        case "bias":
            values = 0.1 * _bell(name, shape)
        case "weight" if parent == "head":
            values = _bell(name, shape) * ((2.0 if len(path) > 1 else 0.5) / sqrt(shape[-1]))
        case "weight":
            # The second convolution of MambaVision's residual blocks has no LayerNorm after it.
            gain = 0.5 if parent == "conv2" and len(shape) == 4 else 1.25
            values = _bell(name, shape) * (gain / sqrt(prod(shape[1:])))
        case _:
            raise KeyError(f"no rule for {name} {shape}")
    return values.astype(np.float32)


def _words(name: str, shape: Shape) -> np.ndarray:
    generator = np.random.PCG64(zlib.crc32(name.encode()))
    return np.asarray(generator.random_raw(prod(shape)), np.uint64).reshape(shape)


def _bell(name: str, shape: Shape) -> np.ndarray:
    """Mean 0, variance 1, within +-3.47: the sum of the four 16-bit quarters of a word, shifted and scaled."""
    words = _words(name, shape)
    total = sum((words >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))
    return (total - 131070) / 37837.22699


def _uniform(name: str, shape: Shape, low: float, high: float) -> np.ndarray:
    unit = (_words(name, shape) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return low + (high - low) * unit
