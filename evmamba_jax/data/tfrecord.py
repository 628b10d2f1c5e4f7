"""Random access to TFRecord files, for the folders that people already have."""

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evmamba_jax.data.kept import kept_arrays
from evmamba_jax.errors import UserError

# A record is: length (8 bytes, little endian), checksum of the length (4), the data, checksum of the data (4).
_HEADER, _FOOTER = 12, 4


class TFRecordFiles:
    """Records by index; a file is opened for each read, so that a thousand shards hold no open files."""

    def __init__(self, shards: Sequence[tuple[str, np.ndarray]]):
        """Take (path, the byte offset of every record to be read) of each shard, in order."""
        self._paths = [path for path, _ in shards]
        self._starts = [starts for _, starts in shards]
        self._ends = np.cumsum([len(starts) for starts in self._starts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._starts[shard][index - self._ends[shard]])  # negative: counted from the shard's end
        with open(self._paths[shard], "rb", buffering=0) as file:
            file.seek(start)
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(start + _HEADER)
            return file.read(length)


def record_offsets(shards: Sequence[Path]) -> list[np.ndarray]:
    """Find where every record starts.

    Walking through ImageNet's million records takes minutes on a slow disk, so the result is kept and used again for
    unchanged files.

    Args:
        shards: the files of one split.

    Returns:
        For each shard the byte offset of each record, int64 (number of records,).

    Raises:
        UserError: a shard ends in the middle of a record; it is named.
    """

    def walk() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(16) as pool:  # the disk, not the processor, is waited for
            offsets = list(pool.map(_scan, shards))
        return {"offsets": np.concatenate(offsets), "splits": np.cumsum([len(o) for o in offsets])[:-1]}

    found = kept_arrays("tfrecord", shards, walk)
    return np.split(found["offsets"], found["splits"])


def _scan(shard: Path) -> np.ndarray:
    size, position, starts = shard.stat().st_size, 0, []
    with open(shard, "rb", buffering=0) as file:
        while position < size:
            starts.append(position)
            file.seek(position)
            header = file.read(8)
            length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
            position += _HEADER + length + _FOOTER
    if position != size:
        raise UserError(
            f"{shard} is truncated or damaged: record {len(starts) - 1} ends beyond the file; copy it again"
        )
    return np.asarray(starts, np.int64)
