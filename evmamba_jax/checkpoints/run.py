"""The checkpoints of one run: saved in the background, the last and the best kept, the newest whole one resumed."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from evmamba_jax.checkpoints import orbax
from evmamba_jax.checkpoints.damage import (
    absolute,
    damage_down_to_healthy,
    damage_of,
    damage_text,
    move_aside,
    steps_in,
)
from evmamba_jax.checkpoints.seal import read_description, write_description
from evmamba_jax.errors import UserError
from evmamba_jax.storage import storage_errors

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.deleting)")


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager that waits for the last save when it is left.

    Every process of the run creates one on the same (shared) folder and makes the same calls in the same order.

    Args:
        directory: where the step folders are; made if missing.
        keep_last: how many of the newest checkpoints stay.
        keep_best: how many of those with the best ``metrics[best_metric]`` stay besides; the earlier step wins a tie,
            and a checkpoint without that metric, or with NaN for it, is never among them.
        best_metric: the metric that says which checkpoints are the best.
        higher: whether more of it is better.
        keep_steps: these stay as well.

    Raises:
        UserError: the folder cannot be made or read, or ``keep_last`` is below 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        best_metric: str = "top1",
        higher: bool = True,
        keep_steps: Collection[int] = (),
    ):
        if keep_last < 1:
            raise UserError(
                f"keep_last is {keep_last}; a run that resumes needs at least its newest checkpoint: 1 or more"
            )
        self.directory = absolute(directory)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.best_metric = best_metric
        self.higher = higher
        self.keep_steps = frozenset(keep_steps)
        with storage_errors(self.directory):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            _barrier("folder made")
            self._scores = {step: self._stored_score(step) for step in steps_in(self.directory)}
            _barrier("folder read")
        self._saving: tuple[int, float | None] | None = None  # the step under way and its score
        self._current: int | None = None  # the step this object saved or restored last
        self._swept = False
        self._writer = orbax.Writer()

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
        determines the state; but metrics that come after the save replace the checkpoint's metrics and meta.

        Args:
            step: number of updates made; this step again, or a larger one than any in the folder.
            items: pytrees of arrays by name, such as "model", "ema", "train"; any other name will do as well.
            meta: what JSON can hold: model name and arguments, config, seed, versions.
            metrics: figures of this state; ``best_metric`` among them ranks it.

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
                self._scores[step] = self._score(about)
                if jax.process_index() == 0:
                    folder = self.directory / str(step)
                    with storage_errors(self.directory):
                        write_description(folder, read_description(folder) | about)
            return
        if self._scores and step <= max(self._scores):
            raise UserError(
                f"cannot save step {step}: {self.directory} already holds checkpoint {max(self._scores)} of an earlier "
                "run; resume that run, or choose another folder"
            )
        self._check_room(items)
        with storage_errors(self.directory):
            self._sweep()
            self._writer.save(self.directory / str(step), items, about)
        self._saving = (step, self._score(about))

    def wait(self) -> None:
        """Block until the save under way is on disk, then delete the checkpoints that are no longer kept.

        Raises:
            UserError: the folder is full or not writable.
        """
        if self._saving is None:
            return
        (step, score), self._saving = self._saving, None
        with storage_errors(self.directory):
            self._writer.wait()
            self._scores[step] = score
            self._current = step
            kept = {*sorted(self._scores)[-self.keep_last :], *self._ranked()[: self.keep_best]}
            for old in sorted(set(self._scores) - kept - self.keep_steps):
                del self._scores[old]
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
        if not self._scores:
            return None
        damage: dict[int, str] = {}
        if jax.process_index() == 0:
            damage = damage_down_to_healthy(self.directory, self.steps())
        healthy = _from_main(max(set(self._scores) - set(damage), default=-1))
        if healthy < 0:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({damage_text(damage)}); "
                "delete them to start again, or choose another folder"
            )
        folder = self.directory / str(healthy)
        _check_fit(folder, abstract_items)
        for step in [step for step in self._scores if step > healthy]:
            del self._scores[step]
            if jax.process_index() == 0:
                aside = move_aside(self.directory, step)
                logger.warning(
                    "checkpoint %d is damaged (%s), moved to %s; continuing from %d", step, damage[step], aside, healthy
                )
        items = self._writer.restore(folder, abstract_items)
        self._current = healthy
        return healthy, items, read_description(folder)["meta"]

    def restore_step(self, step: int, abstract_items: Mapping[str, Any]) -> dict[str, Any]:
        """Read the items of one step into the given shardings; nothing is moved aside.

        Raises:
            UserError: there is no such step, it is damaged, or it has other names, shapes or dtypes.
        """
        self.wait()
        folder = self.directory / str(step)
        damage = "it is missing"
        if step in self._scores:
            damage = damage_of(folder) if jax.process_index() == 0 else ""
        if not _from_main(int(not damage)):
            raise UserError(f"checkpoint {folder} cannot be read ({damage}): the run needs it, so start a new one")
        _check_fit(folder, abstract_items)
        return self._writer.restore(folder, abstract_items)

    def restore_meta(self) -> dict[str, Any] | None:
        """Return the newest checkpoint's ``meta`` without reading any array; None when there is none to be read."""
        for step in reversed(self.steps()):
            with contextlib.suppress(ValueError):
                return read_description(self.directory / str(step))["meta"]
        return None

    def steps(self) -> list[int]:
        """Return the steps on disk, oldest first."""
        self.wait()
        return sorted(self._scores)

    def best_step(self) -> int | None:
        """Return the step with the best metric, the earliest of equals; None when no checkpoint has it."""
        self.wait()
        return next(iter(self._ranked()), None)

    def close(self) -> None:
        """Wait for the save under way and release orbax's threads; see ``wait`` for what is raised."""
        try:
            self.wait()
        finally:
            self._writer.close()

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

    def _score(self, description: Mapping[str, Any]) -> float | None:
        """Return the metric that ranks a checkpoint, turned so that more is better."""
        value = (description["metrics"] or {}).get(self.best_metric)
        if value is None or np.isnan(value):
            return None
        return value if self.higher else -value

    def _stored_score(self, step: int) -> float | None:
        try:
            return self._score(read_description(self.directory / str(step)))
        except ValueError:  # damaged or foreign: restore says so if it comes to that
            return None

    def _ranked(self) -> list[int]:
        known = {step: score for step, score in self._scores.items() if score is not None}
        return sorted(known, key=lambda step: (-known[step], step))

    def _sweep(self) -> None:
        """Remove what killed saves and deletions left; a run that only reads must not, hence at the first save."""
        if not self._swept and jax.process_index() == 0:
            for path in self.directory.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.rmtree()
        self._swept = True


def _check_fit(folder: epath.Path, abstract_items: Mapping[str, Any]) -> None:
    """Raise a UserError when names, shapes or dtypes in the checkpoint are not those asked for."""
    differences = []
    for item, abstract in abstract_items.items():
        if not (folder / item).is_dir():
            present = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise UserError(
                f"checkpoint {folder} has no {item!r}, only {present}; resume with the settings it was made with"
            )
        stored = _described(orbax.shapes(folder / item))
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


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"evmamba_jax checkpoints: {name}")


def _from_main(value: int) -> int:
    """Return the first process's value on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
