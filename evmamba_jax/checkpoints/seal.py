"""checkpoint.json: what a checkpoint says of itself, with size and CRC-32 of every file beside it."""

import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

DESCRIPTION = "checkpoint.json"
# Orbax rewrites these while it renames the folder, after the checksums are taken; nothing here reads them.
_UNSEALED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def seal(folder: epath.Path, about: dict[str, Any]) -> None:
    """Write checkpoint.json with ``about`` (meta and metrics) and the checksums of all files of a complete folder."""
    files = {
        path.relative_to(folder).as_posix(): [path.stat().length, crc32(path)]
        for path in _files_below(folder)
        if path.name not in _UNSEALED
    }
    write_description(folder, about | {"files": files})


def write_description(folder: epath.Path, content: dict[str, Any]) -> None:
    """Write checkpoint.json, or replace it in one move."""
    beside = folder / f"{DESCRIPTION}.tmp"
    with beside.open("w") as file:
        json.dump({"crc32": _crc32_of_json(content), "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / DESCRIPTION)


def read_description(folder: epath.Path) -> dict[str, Any]:
    """Return meta, metrics and files of a checkpoint; raise a ValueError when they are not as written."""
    try:
        stored = json.loads((folder / DESCRIPTION).read_text())
        if stored["crc32"] == _crc32_of_json(stored["content"]):
            return stored["content"]
    except FileNotFoundError:
        raise ValueError(f"it has no {DESCRIPTION}, so it is not whole or not of evmamba-jax") from None
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{DESCRIPTION} has changed since it was written")


def _crc32_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


def crc32(path: epath.Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path
