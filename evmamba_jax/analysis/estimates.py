"""How fast a train step would be on a TPU that is not there: the preflight's estimate."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from evmamba_jax.counting import count_flops
from evmamba_jax.errors import UserError
from evmamba_jax.models.registry import abstract_model
from evmamba_jax.preflight import aot, gpu
from evmamba_jax.preflight.__main__ import inspect
from evmamba_jax.preflight.clock import UNCERTAINTY
from evmamba_jax.preflight.program import Request
from evmamba_jax.preflight.report import needed, step_bounds, step_time

KNOWN = (
    "Estimates: nothing ran. Each instruction takes as long as the schedule of the TPU's compiler or its bytes to and "
    "from memory, whichever is longer, and no transfer between memories or devices is hidden behind computation. "
    f"{UNCERTAINTY}"
)


class Estimate(NamedTuple):
    """What the compiler says of a train step.

    Attributes:
        images_per_second: with no exchange between devices or memories hidden behind computation.
        memory: bytes of a device.
        compile_seconds: here.
        multiply_adds: of one image in evaluation mode.
    """

    images_per_second: float
    memory: float
    compile_seconds: float
    multiply_adds: int


def check_topology(name: str) -> None:
    """Raise a UserError for a TPU system that does not exist, and for a GPU, of which no time is known."""
    if gpu.is_gpu(name):
        raise UserError(f"--topology {name}: no time is known of a GPU that is not there; name a TPU, e.g. v5e-1")
    try:
        aot.topology(name)
    except ValueError as error:
        raise UserError(f"--topology: {error}") from error


def estimate(model: str, *, batch: int, image_size: int, dtype: str, topology: str) -> Estimate:
    """Compile the train step that :func:`evmamba_jax.analysis.throughput` measures, for a TPU that is not there.

    Args:
        model: a registered name.
        batch: images a step, over all devices.
        image_size: side of the images in pixels.
        dtype: compute type.
        topology: as for the preflight, e.g. "v5e-1".

    Raises:
        UserError: the compiler is not installed, or refuses the step.
    """
    arguments = ", ".join(map(repr, (model, batch, image_size, dtype)))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "step.py"
        config.write_text(
            "from evmamba_jax.analysis.speed import training_config\n\n\n"
            f"def get_config():\n    return training_config({arguments})\n"
        )
        facts = inspect(Request(["--config", str(config)], topology), fast=False)
    if "refusal" in facts:
        raise UserError(f"the compiler refuses it: {facts['refusal']['line']}")
    _, seconds = step_bounds(step_time(facts))
    if needed(facts) > facts["available"]:
        raise UserError(f"out of memory: {needed(facts) / 2**30:.2f} of {facts['available'] / 2**30:.2f} GiB")
    return Estimate(
        images_per_second=batch / seconds,
        memory=needed(facts),
        compile_seconds=facts["compile_seconds"],
        multiply_adds=count_flops(abstract_model(model), image_size),
    )
