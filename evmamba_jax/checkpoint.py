"""Checkpoints on disk: written in the background, complete or absent, checked before they are trusted.

One folder a step, holding one orbax item for each part of the state::

    checkpoints/300/model/           parameters and batch statistics
                    ema/             their moving average, where the run keeps one
                    train/           whatever else the trainer needs to continue
                    checkpoint.json  the caller's meta, the metrics, and size and CRC-32 of every file above

A save goes into a temporary folder that is renamed once everything, checkpoint.json last, is in it. So a killed save
leaves the previous checkpoint alone, and a folder with a number for a name is either whole or has been damaged since,
which the checksums tell before orbax meets it (with an error of its own kind for each kind of file).
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from evmamba_jax.errors import UserError
from evmamba_jax.storage import storage_errors

logger = logging.getLogger(__name__)

DESCRIPTION = "checkpoint.json"
# Orbax rewrites these while it renames the folder, after the checksums are taken; nothing here reads them.
_UNSEALED = ("_CHECKPOINT_METADATA", "commit_success.txt")
_TEMPORARY = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.deleting)")

# Orbax reports every phase of every save through absl, whose level is INFO once flags are parsed. What matters comes
# as an exception.
absl_logging.get_absl_logger().addFilter(lambda record: os.path.join("orbax", "checkpoint") not in record.pathname)


class _SealingHandler(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several items, which describes and seals them before the folder gets its final name."""

    about: dict[str, Any]  # meta and metrics of the save under way

    def finalize(self, directory: epath.Path) -> None:
        """Complete the items, then write checkpoint.json; orbax calls this on the first process only."""
        super().finalize(directory)
        files = {
            path.relative_to(directory).as_posix(): [path.stat().length, _crc32(path)]
            for path in _files_below(directory)
            if path.name not in _UNSEALED
        }
        _write_description(directory, self.about | {"files": files})


@ocp.args.register_with_handler(_SealingHandler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """The items of one checkpoint, by name."""


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager that waits for the last save when it is left.

    Every process of the run creates one on the same (shared) folder and makes the same calls in the same order.

    Args:
        directory: where the step folders are; made if missing.
        keep_last: how many of the newest checkpoints stay.
        keep_best: how many of those with the highest ``metrics["top1"]`` stay besides; the earlier step wins a tie, and
            a checkpoint without that metric, or with NaN for it, is never among them.

    Raises:
        UserError: the folder cannot be made or read, or ``keep_last`` is below 1.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 3, keep_best: int = 1):
        if keep_last < 1:
            raise UserError(
                f"keep_last is {keep_last}; a run that resumes needs at least its newest checkpoint: 1 or more"
            )
        self.directory = _absolute(directory)
        self.keep_last = keep_last
        self.keep_best = keep_best
        with storage_errors(self.directory):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            _barrier("folder made")
            self._top1 = {step: _read_top1(self.directory / str(step)) for step in _steps_in(self.directory)}
            _barrier("folder read")
        self._saving: tuple[int, float | None] | None = None  # the step under way and its top-1
        self._current: int | None = None  # the step this object saved or restored last
        self._swept = False
        self._handler = _SealingHandler()
        self._checkpointer = ocp.AsyncCheckpointer(self._handler)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        try:
            self.close()
        except UserError as error:
            if exc is None:
                raise
            logger.warning("%s", error)  # the exception already on its way says more

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start writing a checkpoint; return as soon as the arrays are copied and may be donated.

        The arrays of the step that this object saved or restored last are not written again, as within a run the step
        determines the state; but metrics that come after the save replace, with meta, those of the checkpoint.

        Args:
            step: number of updates made; otherwise larger than that of any checkpoint in the folder.
            items: pytrees of arrays by name: "model", "ema", "train".
            meta: what JSON can hold: model name and arguments, config, seed, versions.
            metrics: figures of this state; "top1" decides which checkpoints are the best.

        Raises:
            UserError: the folder holds this step or a later one already, or is full or not writable. A save that fails
                in the background is reported by the next call.
        """
        self.wait()
        about = {
            "meta": dict(meta),
            "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        }
        if step == self._current:
            if metrics is not None:
                self._top1[step] = _top1(about)
                if jax.process_index() == 0:
                    folder = self.directory / str(step)
                    with storage_errors(self.directory):
                        _write_description(folder, _read_description(folder) | about)
            return
        if self._top1 and step <= max(self._top1):
            raise UserError(
                f"cannot save step {step}: {self.directory} already holds checkpoint {max(self._top1)} of an earlier "
                "run; resume that run, or choose another folder"
            )
        self._handler.about = about
        args = _Items(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
        self._check_room(items)
        with storage_errors(self.directory):
            self._sweep()
            self._checkpointer.save(self.directory / str(step), args=args)
        self._saving = (step, _top1(about))

    def wait(self) -> None:
        """Block until the save under way is on disk, then delete the checkpoints that are no longer kept.

        Raises:
            UserError: the folder is full or not writable.
        """
        if self._saving is None:
            return
        (step, top1), self._saving = self._saving, None
        with storage_errors(self.directory):
            self._checkpointer.wait_until_finished()
            self._top1[step] = top1
            self._current = step
            kept = {*sorted(self._top1)[-self.keep_last :], *self._ranked()[: self.keep_best]}
            for old in sorted(set(self._top1) - kept):
                del self._top1[old]
                if jax.process_index() == 0:
                    # Renamed first: a kill in between leaves rubbish to sweep, not half a checkpoint.
                    rubbish = (self.directory / str(old)).rename(self.directory / f"{old}.deleting")
                    rubbish.rmtree()

    def restore(self, abstract_items: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Read the newest undamaged checkpoint into the given shardings.

        Damaged checkpoints newer than the one used are named in a warning and moved aside to ``damaged-STEP``.

        Args:
            abstract_items: pytrees by item name, with a ``jax.ShapeDtypeStruct`` that has a sharding for each array;
                the mesh may differ from the one that saved. Items that are not asked for are not read.

        Returns:
            step, items (structured and sharded like ``abstract_items``) and meta; None when there is no checkpoint.

        Raises:
            UserError: all are damaged, or the checkpoint has other names, shapes or dtypes.
        """
        self.wait()
        if not self._top1:
            return None
        damage: dict[int, str] = {}
        if jax.process_index() == 0:
            damage = _damage_down_to_healthy(self.directory, self.steps())
        healthy = _from_main(max(set(self._top1) - set(damage), default=-1))
        if healthy < 0:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({_damage_text(damage)}); "
                "delete them to start again, or choose another folder"
            )
        folder = self.directory / str(healthy)
        _check_fit(folder, abstract_items)
        for step in [step for step in self._top1 if step > healthy]:
            del self._top1[step]
            if jax.process_index() == 0:
                aside = _move_aside(self.directory, step)
                logger.warning(
                    "checkpoint %d is damaged (%s), moved to %s; continuing from %d", step, damage[step], aside, healthy
                )
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
        restored = self._checkpointer.restore(folder, args=_Items(**args))
        self._current = healthy
        return healthy, {name: restored[name] for name in abstract_items}, _read_description(folder)["meta"]

    def restore_meta(self) -> dict[str, Any] | None:
        """Return the newest checkpoint's ``meta`` without reading any array; None when there is none to be read."""
        for step in reversed(self.steps()):
            with contextlib.suppress(ValueError):
                return _read_description(self.directory / str(step))["meta"]
        return None

    def steps(self) -> list[int]:
        """Return the steps on disk, oldest first."""
        self.wait()
        return sorted(self._top1)

    def best_step(self) -> int | None:
        """Return the step with the highest top-1, the earliest of equals; None when no checkpoint has one."""
        self.wait()
        return next(iter(self._ranked()), None)

    def close(self) -> None:
        """Wait for the save under way and release orbax's threads; see ``wait`` for what is raised."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _check_room(self, items: Mapping[str, Any]) -> None:
        """Refuse a save that the disk has no room for before anything of it is written."""
        if "://" in str(self.directory):  # a bucket
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items)))
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"cannot write in {self.directory}: a checkpoint needs {needed / 2**20:.1f} MiB and "
                f"{free / 2**20:.1f} are free; make room, or choose another work folder"
            )

    def _ranked(self) -> list[int]:
        known = {step: top1 for step, top1 in self._top1.items() if top1 is not None}
        return sorted(known, key=lambda step: (-known[step], step))

    def _sweep(self) -> None:
        """Remove what killed saves and deletions left; a run that only reads must not, hence at the first save."""
        if not self._swept and jax.process_index() == 0:
            for path in self.directory.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.rmtree()
        self._swept = True


def save_model(
    directory: str | os.PathLike, *, params: Mapping[str, Any], batch_stats: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Write a model without its training state, such as converted weights, as checkpoint 0 of a folder; wait for it.

    Args:
        directory: a folder without checkpoints; made if missing.
        params: arrays by path.
        batch_stats: arrays by path; may be empty.
        meta: as for ``Checkpoints.save``.

    Raises:
        UserError: the folder holds a checkpoint already, or is full or not writable.
    """
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(0, {"model": {"params": dict(params), "batch_stats": dict(batch_stats)}}, meta=meta)


def load_model(
    directory: str | os.PathLike, *, ema: bool = False
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read a model from a checkpoint of ``Checkpoints`` or ``save_model``; changes nothing on disk.

    Args:
        directory: the folder of one step; or a folder of such folders, or a work folder with such a folder
            ``checkpoints`` in it, of which the newest undamaged step is read.
        ema: read the moving average in place of the parameters themselves.

    Returns:
        params and batch_stats (NumPy arrays by path) and meta.

    Raises:
        UserError: there is no such folder, no checkpoint in it, none that is whole, or no moving average in that.
    """
    folder = _find(_absolute(directory))
    item = folder / ("ema" if ema else "model")
    if not item.is_dir():
        missing = "moving average (EMA); read the parameters themselves, or train with one" if ema else "model"
        raise UserError(f"checkpoint {folder} has no {missing}")
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(item).tree)
    state = handler.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return state["params"], state["batch_stats"], _read_description(folder)["meta"]


def load_meta(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the meta of the checkpoint that ``load_model`` reads from a folder; raises the same."""
    return _read_description(_find(_absolute(directory)))["meta"]


def _find(root: epath.Path) -> epath.Path:
    """Return the newest undamaged step folder at or below ``root``."""
    if not root.is_dir():
        hint = "; convert official weights first: python -m evmamba_jax.weights convert --help" if root.exists() else ""
        raise UserError(f"{root} is not a folder, so no checkpoint can be read from it{hint}")
    if (root / "model").is_dir():
        damage = _damage(root)
        if damage:
            raise UserError(f"checkpoint {root} is damaged ({damage}); use another step or another copy of it")
        return root
    for folder in (root, root / "checkpoints"):
        steps = _steps_in(folder) if folder.is_dir() else []
        if steps:
            damaged = _damage_down_to_healthy(folder, steps)
            healthy = [step for step in steps if step not in damaged]
            if not healthy:
                raise UserError(
                    f"every checkpoint in {folder} is damaged ({_damage_text(damaged)}); use another folder"
                )
            for step, damage in damaged.items():
                logger.warning("checkpoint %d is damaged (%s); reading %d", step, damage, healthy[-1])
            return folder / str(healthy[-1])
    raise UserError(
        f"no checkpoint in {root}: it has no folders named by step numbers, nor has a folder 'checkpoints' in it"
    )


def _absolute(directory: str | os.PathLike) -> epath.Path:
    return epath.Path(directory).expanduser().resolve()


def _steps_in(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


# Description


def _write_description(folder: epath.Path, content: dict[str, Any]) -> None:
    """Write checkpoint.json, or replace it in one move."""
    beside = folder / f"{DESCRIPTION}.tmp"
    with beside.open("w") as file:
        json.dump({"crc32": _crc32_of_json(content), "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / DESCRIPTION)


def _read_description(folder: epath.Path) -> dict[str, Any]:
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


def _top1(description: Mapping[str, Any]) -> float | None:
    top1 = (description["metrics"] or {}).get("top1")
    return None if top1 is None or np.isnan(top1) else top1


def _read_top1(folder: epath.Path) -> float | None:
    try:
        return _top1(_read_description(folder))
    except ValueError:  # damaged or foreign: restore says so if it comes to that
        return None


def _check_fit(folder: epath.Path, abstract_items: Mapping[str, Any]) -> None:
    """Raise a UserError when names, shapes or dtypes in the checkpoint are not those asked for."""
    differences = []
    for item, abstract in abstract_items.items():
        if not (folder / item).is_dir():
            present = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise UserError(
                f"checkpoint {folder} has no {item!r}, only {present}; resume with the settings it was made with"
            )
        stored = _described(ocp.StandardCheckpointHandler().metadata(folder / item).tree)
        wanted = _described(abstract)
        for name in sorted({*stored, *wanted}):
            there, here = stored.get(name, "absent"), wanted.get(name, "absent")
            if there != here:
                differences.append(f"{item}/{name} is {there} there and {here} here")
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"checkpoint {folder} is of another model or other settings: {'; '.join(differences[:3])}{more}; "
            "use the settings it was made with, or another folder"
        )


def _described(tree: Any) -> dict[str, str]:
    """Map the name of each array of a pytree to its dtype and shape, alike for states and for orbax's metadata."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


# Damage


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _damage(folder: epath.Path) -> str | None:
    """Return what is wrong with a checkpoint's files in a few words; None when each is as it was written."""
    try:
        files = _read_description(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().length != size:
            return f"{name} has {path.stat().length} bytes instead of {size}"
        if _crc32(path) != crc:
            return f"{name} has changed since it was written"
    return None


def _damage_down_to_healthy(folder: epath.Path, steps: list[int]) -> dict[int, str]:
    """Return what is wrong with the newest steps, down to the first undamaged one, which is not looked beyond."""
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        damage = _damage(folder / str(step))
        if damage is None:
            break
        damaged[step] = damage
    return damaged


def _damage_text(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"{step}: {damage}" for step, damage in damaged.items())


def _move_aside(directory: epath.Path, step: int) -> str:
    names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{count}" for count in range(2, 1000))))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name


def _crc32(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


# Processes


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"evmamba_jax checkpoints: {name}")


def _from_main(value: int) -> int:
    """Return the first process's value on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
