"""A model on its own: written without training state, read from wherever a checkpoint is."""

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from evmamba_jax.checkpoints import orbax
from evmamba_jax.checkpoints.damage import absolute, damage_down_to_healthy, damage_of, damage_text, steps_in
from evmamba_jax.checkpoints.run import Checkpoints
from evmamba_jax.checkpoints.seal import DESCRIPTION, read_description
from evmamba_jax.errors import UserError

logger = logging.getLogger(__name__)


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


class Saved(NamedTuple):
    """A checkpoint found whole: its folder, and what it says of itself."""

    folder: epath.Path
    meta: dict[str, Any]

    @property
    def has_ema(self) -> bool:
        """Whether it has a moving average."""
        return (self.folder / "ema").is_dir()

    def read(self, *, ema: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return params and batch_stats of the model, or of its moving average, as NumPy arrays by path.

        Raises:
            UserError: the checkpoint has none.
        """
        item = self.folder / ("ema" if ema else "model")
        if not item.is_dir():
            missing = "moving average (EMA); read the parameters themselves, or train with one" if ema else "model"
            raise UserError(f"checkpoint {self.folder} has no {missing}")
        state = orbax.read(item)
        return state["params"], state["batch_stats"]


def find(directory: str | os.PathLike) -> Saved:
    """Find a checkpoint of ``Checkpoints`` or ``save_model``; changes nothing on disk.

    Args:
        directory: the folder of one step; or a folder of such folders, or a work folder with such a folder
            ``checkpoints`` in it: the newest undamaged step is taken, or the step that its meta says the run stands
            for (``"stands_for"``), if that is undamaged too.

    Raises:
        UserError: there is no such folder, no checkpoint in it, or none that is whole.
    """
    root = absolute(directory)
    folder = _newest(root)
    meta = read_description(folder)["meta"]
    other = folder.parent / str(meta.get("stands_for"))
    if folder != root and other != folder and other.is_dir():
        damage = damage_of(other)
        if not damage:
            return Saved(other, read_description(other)["meta"])
        logger.warning("checkpoint %s, the best, is damaged (%s); reading %s", other.name, damage, folder.name)
    return Saved(folder, meta)


def load_model(
    directory: str | os.PathLike, *, ema: bool = False
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return params, batch_stats (NumPy arrays by path) and meta of the checkpoint that ``find`` finds.

    Raises:
        UserError: as ``find``; the checkpoint has no moving average.
    """
    saved = find(directory)
    return *saved.read(ema=ema), saved.meta


def load_meta(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the meta of the checkpoint that ``find`` finds; raises the same."""
    return find(directory).meta


def _newest(root: epath.Path) -> epath.Path:
    """Return the newest undamaged step folder at or below ``root``."""
    if not root.is_dir():
        hint = "; convert official weights first: python -m evmamba_jax.weights convert --help" if root.exists() else ""
        raise UserError(f"{root} is not a folder, so no checkpoint can be read from it{hint}")
    if (root / "model").is_dir() or (root / DESCRIPTION).exists():
        damage = damage_of(root)
        if damage:
            raise UserError(f"checkpoint {root} is damaged ({damage}); use another step or another copy of it")
        return root
    for folder in (root, root / "checkpoints"):
        steps = steps_in(folder) if folder.is_dir() else []
        if steps:
            damaged = damage_down_to_healthy(folder, steps)
            healthy = [step for step in steps if step not in damaged]
            if not healthy:
                raise UserError(f"every checkpoint in {folder} is damaged ({damage_text(damaged)}); use another folder")
            for step, damage in damaged.items():
                logger.warning("checkpoint %d is damaged (%s); reading %d", step, damage, healthy[-1])
            return folder / str(healthy[-1])
    inner = sorted(path.name for path in root.iterdir() if (path / "checkpoints").is_dir())
    hint = f"; but there are runs in it, name one: {', '.join(inner[:5])}" if inner else ""
    raise UserError(
        f"no checkpoint in {root}: it has no folders named by step numbers, nor has a folder 'checkpoints' in it{hint}"
    )
