"""Device time of the GPU kernels on the GPU at hand, next to their peers.

Medians of device times, forward and backward, and ratios to ours. Peers that are not installed are left out. They are:
the CUDA selective scan of mamba-ssm, alone and within VMamba's chain (cross-scan, projections, scan, cross-merge); the
scan of jax-linear-attention where it takes the states (Hopper only; it is traced for minutes); and a copy, which tells
the bandwidth. Those called "alone" get step sizes, B and C ready, and write what nobody has added up yet.

    python tests/kernels/compare_gpu.py                       # first: are the results right on this GPU?
    python benchmarks/gpu_scan.py [--runs 20] [--out FILE]    # some minutes, most of them to compile
"""

import argparse
import functools
import importlib.util
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from pallas_kernels import ATROUS, CROSS, Order, gpu

BOTH = (Order(), Order(reverse=True))
BATCH = 128
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


def compiled(programs):
    """Compile programs, pairs of a function and its arguments, beside one another."""
    lowered = [jax.jit(function).lower(*arguments) for function, arguments in programs]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda program: program.compile(), lowered))


def jax_time(function, arguments, runs):
    """Return the median of the device times of all kernels of a compiled function, in ms."""
    from jax.experimental.mosaic.gpu import profiler

    return statistics.median(profiler.measure(function, iterations=runs)(*arguments)[1])


def torch_time(function, runs):
    import torch

    times = []
    for i in range(runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end)] if i >= 3 else []
    return statistics.median(times)


@functools.partial(jax.jit, static_argnums=range(6))
def arrays(orders, height, width, channels, rank, state):
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


def jax_peers(orders, full, alone):
    """Yield (name, forward, its arguments, backward, its arguments)."""
    forward, backward = gpu.SCAN2D.passes(orders=orders)
    yield "scan2d (ours)", forward, full, backward, (full, full[:1])
    start = jnp.zeros((BATCH, *alone[2].shape))
    forward, backward = gpu.SELECTIVE_SCAN.passes(delta_softplus=True, reverse=False)
    arguments = (*alone, start)
    yield "selective_scan alone (ours)", forward, arguments, backward, (arguments, (jnp.float32(alone[0]), start))
    if importlib.util.find_spec("jla") and alone[2].shape[1] in (4, 8, 16, 32):
        yield "jax-linear-attention, scan alone", *linear_attention_programs(*alone)


def linear_attention_programs(u, delta, A, B, C, D, bias):
    """Return what ``jax_peers`` yields of jax-linear-attention: a call for each set of channels, filled up to 128."""
    from jla.ops import linear_attention

    def scan(*arguments):
        return [
            linear_attention("mamba1", C, B, u, dt=dt, a=a, d=d, dt_bias=bias, dt_softplus=True, impl="mosaic_gpu")[0]
            for u, dt, B, C, a, d, bias in zip(*arguments, strict=True)
        ]

    more = -u.shape[-1] % 128
    u, delta, A, D, bias = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) for x in (u, delta, A, D, bias))
    arguments = *(x.transpose(2, 0, 1, 3) for x in (u, delta, B, C)), A.swapaxes(1, 2), D, bias
    y, pull = jax.jit(lambda *arguments: jax.vjp(scan, *arguments))(*arguments)
    return scan, arguments, lambda pull, dy: pull(dy), (pull, y)


def torch_peers(orders, full, alone):
    """Yield (name, forward, backward) of what is on the GPU with PyTorch, the tensors within."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("mamba_ssm")):
        return
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def tensor(x, grad=True):
        dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
        return torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=dtype, requires_grad=grad)

    def pair(function, *inputs):
        y = function(*inputs)
        return lambda: function(*inputs), lambda: torch.autograd.grad(y, inputs, y.detach(), retain_graph=True)

    u, delta, A, B, C, D, bias = (np.asarray(x, np.float32) for x in alone)
    rows = [jnp.bfloat16(x.reshape(*x.shape[:2], -1).swapaxes(1, 2)) for x in (u, delta)]
    few = [jnp.bfloat16(x.transpose(0, 2, 3, 1)) for x in (B, C)]
    flat = [jnp.float32(x) for x in (A.swapaxes(1, 2).reshape(-1, A.shape[1]), D.ravel(), bias.ravel())]

    def scan(u, delta, A, B, C, D, bias):
        return selective_scan_fn(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

    yield "mamba-ssm, scan alone", *pair(scan, *map(tensor, (*rows, flat[0], *few, *flat[1:])))
    if orders is not CROSS:
        return
    image, x_weight, dt_weight, dt_bias, A, D = full
    rank, state = dt_weight.shape[1], A.shape[2]

    def chain(x, x_weight, dt_weight, bias, A, D):
        """VMamba's SS2D, section 4.3: four sequences, projected, scanned, and summed where they came from."""
        b, c, h, w = x.shape
        two = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        xs = torch.cat([two, two.flip(-1)], 1)
        projected = torch.einsum("bkdl,kdc->bkcl", xs, x_weight)
        dt, B, C = projected.split([rank, state, state], 2)
        dts = torch.einsum("bkrl,krd->bkdl", dt, dt_weight)
        one = (t.reshape(b, 4 * c, -1).contiguous() for t in (xs, dts))
        ys = selective_scan_fn(
            *one, A.flatten(0, 1), B.contiguous(), C.contiguous(), D.flatten(), delta_bias=bias.flatten(),
            delta_softplus=True,
        ).view(b, 4, c, -1)  # fmt: skip
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        return ys[:, 0] + ys[:, 1].view(b, c, w, h).transpose(2, 3).flatten(2)

    narrow = [image.transpose(0, 3, 1, 2), x_weight.astype(jnp.bfloat16), dt_weight.astype(jnp.bfloat16)]
    yield "VMamba's chain on mamba-ssm", *pair(chain, *map(tensor, (*narrow, dt_bias, A, D)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each program (default 20)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    large = jnp.zeros((2**28,), jnp.float32)
    [copy] = compiled([(lambda x: x + 1, (large,))])
    bandwidth = 2 * large.nbytes / jax_time(copy, (large,), options.runs)  # bytes a ms
    report = Report(
        "Scans on a GPU",
        options.out,
        machine=jax.devices()[0].device_kind,
        versions=machine.versions("Python", "jax", "jaxlib", "torch", "mamba-ssm", "jax-linear-attention"),
        date=machine.today(),
    )
    report.text(
        f"Batch {BATCH}, bfloat16, TF32 for float32 products; written by `benchmarks/gpu_scan.py`. A copy of 1 GiB "
        f"moves {bandwidth / 1e9:.2f} TB/s, read and written. Median device time of {options.runs} runs in ms, on "
        "the same inputs. Ratios are to `scan2d`, of scans alone to `selective_scan` alone; above 1, ours is faster. "
        "Bandwidth: the bytes that a scan alone must move (u, step size and y; backward these two, dy, and their "
        "gradients; y, dy and the gradient of u in float32) over its time, as a share of the copy's."
    )
    numbers = [[(way, "{:.3f}"), ("ratio", "{:.2f}"), ("bandwidth", "{:.0%}")] for way in ("forward", "backward")]
    report.table("shape", "what", *numbers[0], *numbers[1])
    given = {shape: arrays(*sizes) for shape, sizes in SHAPES.items()}
    peers = {shape: list(jax_peers(SHAPES[shape][0], *both)) for shape, both in given.items()}
    programs = [program for of in peers.values() for _, *both in of for program in (both[:2], both[2:])]
    functions = iter(compiled(programs))
    for shape, (orders, *sizes) in SHAPES.items():
        full, alone = given[shape]
        rows = [
            (name, *(jax_time(next(functions), arguments, options.runs) for arguments in both[1::2]))
            for name, *both in peers[shape]
        ]
        for name, forward, backward in torch_peers(orders, full, alone):
            rows.append((name, torch_time(forward, options.runs), torch_time(backward, options.runs)))
        visits = sum(order.length(*sizes[:2]) for order in orders) * BATCH * sizes[2]
        ours = {"alone" in name: both for name, *both in rows if "(ours)" in name}
        for name, *both in rows:
            cells = []
            for time, base, moved in zip(both, ours["alone" in name], (2 + 2 + 4, 2 + 2 + 4 + 4 + 2), strict=True):
                share = moved * visits / time / bandwidth if "selective_scan" in name else None
                cells += [time, time / base, share]
            report.row(shape, name, *cells)


if __name__ == "__main__":
    main()
