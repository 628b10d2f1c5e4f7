"""Weights and images made by a rule, the ones under which the official models gave the numbers in tests/golden.

A tensor depends only on its name and shape in the official ``state_dict``. Its randomness is the raw 64-bit stream of
PCG64 seeded with the CRC-32 of the name; all that follows is integer or plain float64 arithmetic, so the float32 result
is the same to the bit on any machine. ``digest`` proves it against the recorded SHA-256.
"""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]


def weights(manifest: Mapping[str, Iterable[int]]) -> dict[str, np.ndarray]:
    """Return {official name: float32 array} for {official name: shape}, in the same order."""
    return {name: tensor(name, tuple(shape)) for name, shape in manifest.items()}


def manifest(model: Any) -> dict[str, Shape]:
    """Return {official name: shape} of one of our models, of any size, by our table of names."""
    from evmamba_jax.arrays import split
    from evmamba_jax.weights.convert import table

    _, params, batch_stats = split(model)
    ours = {path: array.shape for path, array in {**params, **batch_stats}.items()}
    return {
        row.official: row.layout.to_official(np.broadcast_to(np.int8(0), ours[row.ours])).shape
        for row in table(model)
        if row.ours in ours
    }


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Return {official name: float32 array} for one of our models, which may be abstract."""
    return weights(manifest(model))


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
    of_time_step, of_projection = parent in ("dt_proj", "dt_proj_b"), parent in ("x_proj", "x_proj_b")
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


def save_pth(path: Path, content: Mapping[str, Any]) -> None:
    """Write arrays, strings and integers in nested dictionaries as ``torch.save`` does, without torch.

    Only float32 and int64 arrays, each in a storage of its own.
    """
    storages: list[np.ndarray] = []
    pickled = b"\x80\x02" + _pickled(content, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", array.astype(array.dtype.newbyteorder("<")).tobytes())


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """Return the opcodes of pickle's protocol 2 that leave ``value`` on the stack."""
    match value:
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case int():
            return b"J" + struct.pack("<i", value)
        case tuple():
            return b"(" + b"".join(_pickled(part, storages) for part in value) + b"t"
        case Mapping():
            items = (part for item in value.items() for part in item)
            return b"}(" + b"".join(_pickled(part, storages) for part in items) + b"u"
    kind = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.int64): b"LongStorage"}[value.dtype]
    key, count = str(len(storages)), value.size
    storages.append(value)
    strides = tuple(prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
    parts = (_pickled(part, storages) for part in ("storage", key, "cpu", count))
    of_storage, of_key, of_place, of_count = parts
    storage = b"(" + of_storage + b"ctorch\n" + kind + b"\n" + of_key + of_place + of_count + b"tQ"
    shape = b"".join(_pickled(part, storages) for part in (0, value.shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + b"\x89ccollections\nOrderedDict\n)RtR"
