"""How fast a model is on the device at hand: images a second, latency, memory, and the time to compile."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.arrays import merge, split
from evmamba_jax.counting import count_flops
from evmamba_jax.errors import UserError, one_of
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.rounds import Spread, spread, steps_for, waited, warmed_up
from evmamba_jax.models.registry import VARIANTS, abstract_model, build_model, configuration, input_size

Mode = Literal["inference", "training"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SECONDS, ROUNDS = 5.0, 10
_GIB = 2**30


class OutOfMemory(UserError):
    """A program needs more memory than there is."""


class DeviceGone(UserError):
    """The device does not answer any more."""


class Throughput(NamedTuple):
    """How fast a model is.

    Attributes:
        images_per_second: the batch over the median seconds of a step.
        quartiles: images/s of the slower and of the faster quarter of the rounds.
        latency: milliseconds from the call with one image to its answer: median of calls that each wait; None in
            training.
        latency_quartiles: milliseconds of the faster and of the slower quarter of these calls; None in training.
        memory: bytes at the peak.
        memory_by: "device", what its ``memory_stats`` say; or "program", where there are none, or where an earlier
            program has needed more: arguments, results and temporaries of the compiled program.
        compile_seconds: to trace, lower and compile; little where JAX's compilation cache has the program.
        multiply_adds: of one image in evaluation mode, by :func:`evmamba_jax.analysis.count_flops`.
        rounds: seconds of a step, the mean of each round.
        steps: how many a round had.
    """

    images_per_second: float
    quartiles: tuple[float, float]
    latency: float | None
    latency_quartiles: tuple[float, float] | None
    memory: int
    memory_by: str
    compile_seconds: float
    multiply_adds: int
    rounds: tuple[float, ...]
    steps: int


def throughput(
    model: str | nnx.Module,
    *,
    batch: int = 8,
    image_size: int | None = None,
    dtype: str = "float32",
    mode: Mode = "inference",
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> Throughput:
    """Measure a model on the device that JAX takes first.

    Images and weights are on the device before the clock starts, two steps warm up, the steps of a round follow each
    other without waiting, and a round ends when the device is done. Inference is the model in evaluation mode, from
    float32 images; training is one update of ``train_tpu.py``: augmentation of uint8 images on the device, forward and
    backward pass, clipping, AdamW, moving average.

    Args:
        model: a registered name, with initial values; or a module that takes float32 (B, H, W, C), for inference.
        batch: images a step; where it is odd, training does not mix them.
        image_size: side of the images in pixels; None takes that of a name, 224 for a module.
        dtype: compute type of a named model, "float32" or "bfloat16"; parameters are float32 either way.
        mode: "inference" or "training".
        seconds: how long all rounds take together; at least three are measured, however long a step takes.
        rounds: how many there are where steps are short.

    Raises:
        UserError: an unknown name, type or mode; a batch or size that the model does not take; a module in training.
        OutOfMemory: the device, or this machine, has not enough of it.
        DeviceGone: the device does not answer any more.
    """
    program = prepare(model, batch=batch, image_size=image_size, dtype=dtype, mode=mode)
    rounds, steps = steps_for(seconds, warmed_up(program.measure), rounds)
    times = [program.measure(steps) for _ in range(rounds)]
    latency = None
    if mode == "inference":
        one = program if batch == 1 else prepare(model, batch=1, image_size=image_size, dtype=dtype, mode=mode)
        latency = waited(one.measure, seconds)
    return program.result(times, steps, latency)


class Program:
    """A compiled step with its arrays on the device.

    Args:
        run: starts a step and returns something to wait for.
        batch: images a step.
        needed: bytes of arguments, results and temporaries.
        compile_seconds: that it took.
        multiply_adds: of one image.
    """

    def __init__(
        self, run: Callable[[], Any], *, batch: int, needed: int, compile_seconds: float, multiply_adds: int
    ) -> None:
        self._run, self.batch, self.needed = run, batch, needed
        self.compile_seconds, self.multiply_adds = compile_seconds, multiply_adds
        self._peak = _peak()

    def measure(self, steps: int) -> float:
        """Return the mean seconds of so many steps, which do not wait for one another."""
        with device_errors():
            began = time.perf_counter()
            out = None
            for _ in range(steps):
                out = self._run()
            jax.block_until_ready(out)
            return (time.perf_counter() - began) / steps

    def result(self, times: list[float], steps: int, latency: Spread | None) -> Throughput:
        """Return what rounds of so many steps, seconds of a step each, and the latency of one image say."""
        median, low, high = spread(times)
        peak = _peak()
        by_device = peak > self._peak
        return Throughput(
            images_per_second=self.batch / median,
            quartiles=(self.batch / high, self.batch / low),
            latency=1e3 * latency.median if latency else None,
            latency_quartiles=(1e3 * latency.low, 1e3 * latency.high) if latency else None,
            memory=peak if by_device else self.needed,
            memory_by="device" if by_device else "program",
            compile_seconds=self.compile_seconds,
            multiply_adds=self.multiply_adds,
            rounds=tuple(times),
            steps=steps,
        )


def prepare(
    model: str | nnx.Module, *, batch: int, image_size: int | None = None, dtype: str = "float32", mode: str
) -> Program:
    """Compile a step of a model and place its arrays; arguments and errors as for :func:`throughput`."""
    make = one_of("mode", mode, {"inference": _inference, "training": _training})
    one_of("dtype", dtype, DTYPES)
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    side = image_size or (input_size(model)[0] if isinstance(model, str) else 224)
    with device_errors():
        return make(model, batch, side, dtype)


def _inference(model: str | nnx.Module, batch: int, side: int, dtype: str) -> Program:
    options = {"dtype": DTYPES[dtype]} | _size_options(model, side) if isinstance(model, str) else {}
    shapes: Any = abstract_model(model, **options) if isinstance(model, str) else model
    graphdef, *arrays = split(shapes)
    channels = getattr(shapes, "backbone", shapes).in_channels  # a segmenter's or detector's are its backbone's
    images = jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)

    def forward(arrays: list[Any], images: jax.Array) -> Any:
        module = merge(graphdef, *arrays)
        module.eval()
        return module(images)

    compiled, seconds = _compile(lambda: jax.jit(forward).lower(arrays, images))
    needed = _refuse_too_large(compiled)
    if isinstance(model, str):
        arrays = list(split(build_model(model, **options))[1:])
    placed = jax.device_put((arrays, np.random.default_rng(0).standard_normal(images.shape, np.float32)))
    return Program(
        lambda: compiled(*placed),
        batch=batch,
        needed=needed,
        compile_seconds=seconds,
        multiply_adds=count_flops(shapes, side),
    )


def training_config(name: str, batch: int, side: int, dtype: str) -> Any:
    """Return the configuration whose train step is measured: the defaults of ``train_tpu.py``, on ImageNet.

    Args:
        name: of the model.
        batch: images a step.
        side: of the images, pixels.
        dtype: compute type.
    """
    from evmamba_jax.training import Config  # late, as all that training needs: it brings the libraries of the data

    config = Config()
    config.model.name, config.model.dtype, config.model.options = name, dtype, _size_options(name, side)
    config.batch_size, config.data.image_size = batch, side
    if batch % 2:
        config.data.mixup = config.data.cutmix = 0.0  # which pair images
    return config


def _training(model: str | nnx.Module, batch: int, side: int, dtype: str) -> Program:
    if not isinstance(model, str):
        raise UserError(f"a {type(model).__name__} cannot be measured in training: give a registered name")
    return train_step(training_config(model, batch, side, dtype))


def train_step(config: Any) -> Program:
    """Compile the update of a training, as ``train_tpu.py`` runs it, on one device, and place its arrays.

    Args:
        config: a :class:`evmamba_jax.config.Config` of classification.
    """
    from evmamba_jax.tasks import task_of
    from evmamba_jax.training.mesh import batch_sharding, make_mesh
    from evmamba_jax.training.setup import Setup

    batch, side = config.batch_size, config.data.image_size
    kind = task_of(config)
    class_names, examples, _ = kind.describe(config)
    task = kind(config, class_names)
    mesh = make_mesh(config, jax.local_devices()[:1])
    setup = Setup(task, mesh, examples)
    compiled, seconds = _compile(setup.lower)
    needed = _refuse_too_large(compiled)
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.integers(0, 256, (batch, side, side, config.data.in_channels), np.uint8),
        "label": rng.integers(0, len(class_names), batch, np.int32),
        "corrupt": np.zeros(batch, np.int32),
    }
    placed = jax.device_put(rows, batch_sharding(mesh))
    state = setup.first_state()

    def update() -> Any:
        nonlocal state
        state = compiled(state, placed)
        return state

    count = count_flops(task.model, side)
    return Program(update, batch=batch, needed=needed, compile_seconds=seconds, multiply_adds=count)


def _size_options(name: str, side: int) -> dict[str, Any]:
    """Return the option of a model that is made for one size of images."""
    one_of("model", name, VARIANTS)
    return {"image_size": side} if hasattr(configuration(name), "image_size") else {}


def _compile(lower: Callable[[], jax.stages.Lowered]) -> tuple[jax.stages.Compiled, float]:
    """Return a program, and the seconds that tracing, lowering and compiling it took."""
    began = time.perf_counter()
    compiled = lower().compile()
    return compiled, time.perf_counter() - began


def _refuse_too_large(compiled: jax.stages.Compiled) -> int:
    """Return the bytes that a program needs; on a CPU, where the system would kill the process, refuse too many.

    Raises:
        OutOfMemory: this machine has fewer.
    """
    memory: Any = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes  # results in the place of arguments
    )
    free = machine.free_memory() if jax.default_backend() == "cpu" else float("inf")
    if needed > free:
        raise OutOfMemory(f"out of memory: the program needs {needed / _GIB:.2f} GiB, {free / _GIB:.2f} GiB are free")
    return needed


def _peak() -> int:
    """Return the most bytes that the device has held since this process began; 0 where it does not say."""
    stats: Mapping[str, int] = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Turn what a device refuses, or that it has gone, into one line."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory("out of memory") from error
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())[:200]
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            raise OutOfMemory("out of memory") from error
        raise DeviceGone(f"the device does not do its work: {text}") from error
