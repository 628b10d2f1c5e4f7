"""Which checkpoints a folder has, and which of them are no longer as they were written."""

import os
from collections.abc import Mapping

from etils import epath

from evmamba_jax.checkpoints.seal import crc32, read_description
from evmamba_jax.storage import is_bucket, local


def absolute(directory: str | os.PathLike) -> epath.Path:
    """Return the path of a folder on a disk or in a bucket."""
    return epath.Path(directory if is_bucket(directory) else local(directory))


def steps_in(folder: epath.Path) -> list[int]:
    """Return the steps that have a folder here, oldest first."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def damage_of(folder: epath.Path) -> str | None:
    """Return what is wrong with a checkpoint's files in a few words; None when each is as it was written."""
    try:
        files = read_description(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().length != size:
            return f"{name} has {path.stat().length} bytes instead of {size}"
        if crc32(path) != crc:
            return f"{name} has changed since it was written"
    return None


def damage_down_to_healthy(folder: epath.Path, steps: list[int]) -> dict[int, str]:
    """Return what is wrong with the newest steps, down to the first undamaged one, which is not looked beyond."""
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        damage = damage_of(folder / str(step))
        if damage is None:
            break
        damaged[step] = damage
    return damaged


def damage_text(damaged: Mapping[int, str]) -> str:
    """Return all damage in one line."""
    return "; ".join(f"{step}: {damage}" for step, damage in damaged.items())


def move_aside(directory: epath.Path, step: int) -> str:
    """Rename a step to ``damaged-STEP``, or to the next name that is free; return that."""
    names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{count}" for count in range(2, 1000))))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name
