"""A process that dies at any moment loses nothing that was complete, and the next continues to the bit.

The training command itself is killed in ``tests/training``; here the run is one of NumPy, so that its lives are short.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax.numpy as jnp
import lives
import pytest

from evmamba_jax.checkpoints import Checkpoints, find, load_model

KILLS = 17


def steps_in(folder):
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.is_dir() else set()


def assert_unkilled(folder, number, state):
    """Check that the newest checkpoint is whole, is of that step, and holds what the run that nobody killed has."""
    for item in ("model", "ema"):
        params, _, meta = load_model(folder, ema=item == "ema")
        assert meta == {"step": number}
        chex.assert_trees_all_equal(params, state[item]["params"])


@pytest.fixture
def nursery():
    """Return the process whose forks the lives are: importing takes longer than to live."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, lives.__file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process


def say(nursery, line):
    nursery.stdin.write(f"{line}\n")
    nursery.stdin.flush()


def test_seventeen_kills_at_random_moments_change_nothing(nursery, tmp_path, caplog):
    folder, chance = tmp_path / "checkpoints", random.Random(0)
    unkilled, remains = lives.states(), set()
    number, state = next(unkilled)
    for kill in range(KILLS):
        before = steps_in(folder)
        say(nursery, f"{10**6} {folder}")
        # Wait until this life has got somewhere, then a random moment more: in a step, in a save, between the two.
        # Every fifth is cut short while it starts.
        if kill % 5 == 4:
            time.sleep(chance.uniform(0, 0.3))
        else:
            deadline = time.monotonic() + 120
            while steps_in(folder) <= before and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.12))
        seen = max(steps_in(folder), default=0)
        say(nursery, "kill")
        assert int(nursery.stdout.readline()) == -signal.SIGKILL
        remains |= {path.suffix for path in folder.iterdir()}
        newest = find(folder).meta["step"]
        assert newest >= seen
        number, state = next(pair for pair in itertools.chain([(number, state)], unkilled) if pair[0] == newest)
        assert_unkilled(folder, number, state)
    assert remains > {""}, "no kill fell into a save, so this tested nothing"
    assert not caplog.records

    say(nursery, f"{number + 3} {folder}\nwait")
    assert int(nursery.stdout.readline()) == 0
    number, state = next(pair for pair in unkilled if pair[0] == number + 3)
    assert_unkilled(folder, number, state)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(10**6, {"train": {"step": jnp.int32(1)}}, meta={})
    assert all(path.name.isdecimal() for path in folder.iterdir()), "the next run sweeps up"
