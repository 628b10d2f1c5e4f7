"""The scans of models on a GPU, ours and jax-linear-attention's, and what compiles and times them.

Device times, median of several runs, ms. Scans "alone" get step sizes, B and C ready, and write what nobody has added
up yet. ``lib/torch_scans.py`` times the peers of PyTorch on inputs of the same shapes.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import ATROUS, CROSS, Order, gpu

BOTH = (Order(), Order(reverse=True))
BATCH, RUNS = 128, 20
# Models at 224 x 224: (orders, height, width, E, R, N).
SHAPES = {
    "EfficientVMamba-T stage 1": (ATROUS, 56, 56, 96, 3, 16),
    "EfficientVMamba-T stage 2": (ATROUS, 28, 28, 192, 6, 16),
    "VMamba-T stage 1": (CROSS, 56, 56, 96, 6, 1),
    "VMamba-T stage 2": (CROSS, 28, 28, 192, 12, 1),
    "VMamba-T stage 3": (CROSS, 14, 14, 384, 24, 1),
    "VMamba-T stage 4": (CROSS, 7, 7, 768, 48, 1),
    "Vim-S": (BOTH, 1, 197, 768, 24, 16),
}
# Bytes a token and channel: u, step size and y; backward u, step size, dy, and the gradients of u and step size. y, dy
# and the gradient of u are float32.
MOVED = {"forward": 2 + 2 + 4, "backward": 2 + 2 + 4 + 4 + 2}

Programs = Sequence[tuple[Callable[..., Any], Sequence[Any]]]


class AtHand:
    """The GPU at hand."""

    def arguments(self, make: Callable[..., Any], *sizes: Any) -> Any:
        """Return arrays, made by a function of sizes."""
        return make(*sizes)

    def times(self, programs: Programs) -> list[float]:
        """Return of each function with its arguments the median of the device times of all its kernels, in ms."""
        from jax.experimental.mosaic.gpu import profiler

        lowered = [jax.jit(function).lower(*arguments) for function, arguments in programs]
        with ThreadPoolExecutor() as pool:
            compiled = list(pool.map(lambda program: program.compile(), lowered))
        return [
            statistics.median(profiler.measure(program, iterations=RUNS)(*arguments)[1])
            for program, (_, arguments) in zip(compiled, programs, strict=True)
        ]


class Described:
    """An H200 that is not there: programs are lowered for it, and are said to take a millisecond."""

    def arguments(self, make: Callable[..., Any], *sizes: Any) -> Any:
        """Return the shapes of arrays."""
        return jax.eval_shape(lambda: make(*sizes))

    def times(self, programs: Programs) -> list[float]:
        """Lower the programs."""
        with use_abstract_mesh(described()):
            for function, arguments in programs:
                jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return [1.0 for _ in programs]


Device = AtHand | Described


def described() -> AbstractMesh:
    """Return a mesh of one H200 that is not there."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


@functools.partial(jax.jit, static_argnums=range(6))
def arrays(orders, height: int, width: int, channels: int, rank: int, state: int) -> tuple[Any, Any]:
    """Return random arguments of ``scan2d``, and of a scan of all orders alone; streams are bfloat16."""
    keys, sets = iter(jax.random.split(jax.random.key(0), 16)), len(orders)
    length = orders[0].length(height, width)

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    image = normal(BATCH, height, width, channels).astype(jnp.bfloat16)
    A, D, bias = -jnp.exp(normal(sets, channels, state)), normal(sets, channels), normal(sets, channels) - 4
    x_weight, dt_weight = normal(sets, channels, rank + 2 * state) / channels**0.5, normal(sets, rank, channels) / rank
    u, delta = (normal(BATCH, length, sets, channels).astype(jnp.bfloat16) for _ in range(2))
    B, C = (normal(BATCH, length, sets, state).astype(jnp.bfloat16) for _ in range(2))
    return (image, x_weight, dt_weight, bias, A, D), (u, delta, A.swapaxes(1, 2), B, C, D, bias)


def both_ways(device: Device, programs: Programs) -> dict[str, float]:
    """Return the times of a forward and a backward program."""
    return dict(zip(("forward", "backward"), device.times(programs), strict=True))


def whole(shape: str, device: Device) -> dict[str, float]:
    """Time ``scan2d`` and its gradient: projections, scan, and merge."""
    orders, *_ = SHAPES[shape]
    full, _ = device.arguments(arrays, *SHAPES[shape])
    forward, backward = gpu.SCAN2D.passes(orders=orders)
    return both_ways(device, [(forward, full), (backward, (full, full[:1]))])


def alone(shape: str, device: Device) -> dict[str, float]:
    """Time ``selective_scan`` and its gradient."""

    def more(*sizes):
        _, given = arrays(*sizes)
        start = jnp.zeros((BATCH, *given[2].shape))
        return (*given, start), (given[0].astype(jnp.float32), start)

    given, cotangents = device.arguments(more, *SHAPES[shape])
    forward, backward = gpu.SELECTIVE_SCAN.passes(delta_softplus=True, reverse=False)
    return both_ways(device, [(forward, given), (backward, (given, cotangents))])


def share_of_copy(shape: str, device: Device) -> dict[str, float]:
    """Time a scan alone, and compare its bandwidth with the bandwidth of a copy of 1 GiB, read and written."""
    large = device.arguments(functools.partial(jnp.zeros, dtype=jnp.float32), 2**28)
    [copied] = device.times([(lambda x: x + 1, (large,))])
    bandwidth = 2 * large.size * large.dtype.itemsize / copied
    orders, height, width, channels, *_ = SHAPES[shape]
    visits = sum(order.length(height, width) for order in orders) * BATCH * channels
    facts = alone(shape, device)
    return facts | {f"share {way}": moved * visits / facts[way] / bandwidth for way, moved in MOVED.items()}


def linear_attention(shape: str, device: Device) -> dict[str, Any]:
    """Time the scan alone of jax-linear-attention: a call for each set of channels, filled up to 128."""
    if importlib.util.find_spec("jla") is None:
        return {"missing": "jax-linear-attention is not installed"}
    if isinstance(device, Described):
        return {"missing": "jax-linear-attention needs a GPU"}
    from jla.ops import linear_attention

    def scan(*arguments):
        return [
            linear_attention("mamba1", C, B, u, dt=dt, a=a, d=d, dt_bias=bias, dt_softplus=True, impl="mosaic_gpu")[0]
            for u, dt, B, C, a, d, bias in zip(*arguments, strict=True)
        ]

    u, delta, A, B, C, D, bias = device.arguments(arrays, *SHAPES[shape])[1]
    more = -u.shape[-1] % 128
    u, delta, A, D, bias = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) for x in (u, delta, A, D, bias))
    given = *(x.transpose(2, 0, 1, 3) for x in (u, delta, B, C)), A.swapaxes(1, 2), D, bias
    y, pull = jax.jit(lambda *arguments: jax.vjp(scan, *arguments))(*given)
    return both_ways(device, [(scan, given), (lambda pull, dy: pull(dy), (pull, y))])


def compiled_shapes() -> Iterator[tuple[str, Any]]:
    """Yield every shape with the passes of ``scan2d`` and their abstract arguments."""
    for shape, (orders, *_) in SHAPES.items():
        full, _ = jax.eval_shape(lambda shape=shape: arrays(*SHAPES[shape]))
        forward, backward = gpu.SCAN2D.passes(orders=orders)
        yield shape, {"forward": (forward, full), "backward": (backward, (full, full[:1]))}
