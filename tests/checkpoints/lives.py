"""A run without a compiler: a step in NumPy, and checkpoints as the training loop makes them.

As a program it lives such runs: for a line ``TOTAL FOLDER`` it forks, once all is imported and nothing is started. The
next line is ``kill`` or ``wait``; then it prints the exit code.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from evmamba_jax.checkpoints import Checkpoints

State = dict[str, Any]


def first() -> State:
    """Return the items of step 0: two parameters among larger ones, so that a save takes a while."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.standard_normal(20_000).astype(np.float32) for i in range(10)}
    return {
        "model": {"params": params, "batch_stats": {}},
        "ema": {"params": dict(params), "batch_stats": {}},
        "train": {"velocity": {name: np.zeros_like(array) for name, array in params.items()}},
    }


def step(state: State, number: int) -> State:
    """Return the items after an update, in which any other order or number of updates shows."""
    noise = np.random.default_rng((1, number)).standard_normal(20_000).astype(np.float32)
    params, average, velocity = {}, {}, {}
    for name, array in state["model"]["params"].items():
        velocity[name] = np.float32(0.9) * state["train"]["velocity"][name] + np.tanh(array * noise)
        params[name] = array - np.float32(0.01) * velocity[name]
        average[name] = state["ema"]["params"][name] * np.float32(0.9) + params[name] * np.float32(0.1)
    return {
        "model": {"params": params, "batch_stats": {}},
        "ema": {"params": average, "batch_stats": {}},
        "train": {"velocity": velocity},
    }


def states() -> Iterator[tuple[int, State]]:
    """Yield every step of the run that nobody kills."""
    number, state = 0, first()
    while True:
        yield number, state
        number, state = number + 1, step(state, number)


def live(folder: str, total: int) -> None:
    """Continue the run in a folder to a step, or to one's death, with a checkpoint of every step."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = first()
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=one), state)
    with Checkpoints(folder, keep_last=1, keep_best=1) as checkpoints:
        restored = checkpoints.restore(abstract)
        number = 0
        if restored:
            number, state = restored[0], jax.tree.map(np.array, restored[1])
        while number < total:
            number, state = number + 1, step(state, number)
            checkpoints.save(number, state, meta={"step": number}, metrics={"top1": number % 7})


if __name__ == "__main__":
    for line in sys.stdin:
        total, folder = line.rstrip("\n").split(" ", 1)
        life = os.fork()
        if not life:
            try:
                live(folder, int(total))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if next(sys.stdin) == "kill\n":
            os.kill(life, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]), flush=True)
