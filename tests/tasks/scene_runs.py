"""A run of two steps on few scenes of digits, and its evaluation, for every task on a backbone with heads."""

import contextlib
import io

import jax
import pytest

from evmamba_jax.data import scenes
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training import run
from evmamba_jax.training.config import Duration


def small(config):
    """Return the configuration with a small backbone and two steps."""
    config.model.options = {"width": 8, "depths": (0, 0, 1, 0), "d_state": 2}
    config.batch_size, config.data.num_threads = 4, 2
    config.duration, config.optim.warmup = Duration(steps=2), Duration(steps=1)
    config.log_every = config.eval_every = config.save_every = Duration(steps=2)
    return config


def on_one_device(config, workdir):
    """Run what ``config`` says, on one of the devices."""
    one_device = meshes.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda config: one_device(config, jax.devices()[:1]))
        return run(config, workdir)


def trained(make, workdir):
    """Train what ``make`` configures, evaluate it anew; return both figures and what the training told."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr(scenes, "LENGTHS", {"train": 8, "test": 6})
        figures = on_one_device(make(), workdir)
        again = make()
        again.eval_only, again.init_from = True, str(workdir)
        evaluated = on_one_device(again, workdir.with_name("evaluated"))
    return figures, evaluated, told.getvalue()
