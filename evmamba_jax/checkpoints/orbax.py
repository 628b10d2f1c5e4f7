"""All that is used of orbax: the classes of its versions before 1.0, whose format the folders keep.

Items go to disk in the background; before their folder gets its final name, checkpoint.json seals it.
"""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from evmamba_jax.checkpoints.seal import seal

# Orbax reports every phase of every save through absl, whose level is INFO once flags are parsed. What matters comes
# as an exception.
absl_logging.get_absl_logger().addFilter(lambda record: os.path.join("orbax", "checkpoint") not in record.pathname)

# Where the disk refuses one of many files, orbax closes its event loop under the others, whose writers then complain of
# that one by one. The first error, which says what is wrong, comes as an exception.
_CLOSED = "Event loop is closed"
_unraisablehook = sys.unraisablehook


def _without_complaints(unraisable: Any) -> None:
    if str(unraisable.exc_value) != _CLOSED:
        _unraisablehook(unraisable)


sys.unraisablehook = _without_complaints
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


class _SealingHandler(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several items, which describes and seals them before the folder gets its final name."""

    about: dict[str, Any]  # meta and metrics of the save under way

    def finalize(self, directory: epath.Path) -> None:
        """Complete the items, then write checkpoint.json; orbax calls this on the first process only."""
        super().finalize(directory)
        seal(directory, self.about)


@ocp.args.register_with_handler(_SealingHandler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """The items of one checkpoint, by name."""


class Writer:
    """Writes items, one folder at a time, and reads them back."""

    def __init__(self):
        self._handler = _SealingHandler()
        self._checkpointer = ocp.AsyncCheckpointer(self._handler)

    def save(self, folder: epath.Path, items: Mapping[str, Any], about: dict[str, Any]) -> None:
        """Start writing; return as soon as the arrays are copied and may be donated."""
        self._handler.about = about
        args = _Items(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
        self._checkpointer.save(folder, args=args)

    def wait(self) -> None:
        """Block until the folder is complete and has its name; raises what the writing did."""
        self._checkpointer.wait_until_finished()

    def restore(self, folder: epath.Path, abstract_items: Mapping[str, Any]) -> dict[str, Any]:
        """Return the items, structured and sharded like ``abstract_items``."""
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
        restored = self._checkpointer.restore(folder, args=_Items(**args))
        return {name: restored[name] for name in abstract_items}

    def close(self) -> None:
        """Release orbax's threads."""
        self._checkpointer.close()


def shapes(item: epath.Path) -> Any:
    """Return the pytree of an item with shape and dtype of each array, without reading any."""
    return ocp.StandardCheckpointHandler().metadata(item).tree


def read(item: epath.Path) -> Any:
    """Return the pytree of an item as NumPy arrays."""
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(item).tree)
    return handler.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
