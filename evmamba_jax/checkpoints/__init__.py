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

from evmamba_jax.checkpoints.model import Saved, find, load_meta, load_model, save_model
from evmamba_jax.checkpoints.run import Checkpoints

__all__ = ["Checkpoints", "Saved", "find", "load_meta", "load_model", "save_model"]
