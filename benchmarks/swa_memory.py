"""Memory, multiply-adds and time of attention in windows, over the whole map and over sliding windows, on this CPU.

One attention layer of MambaVision-T's third stage: 320 channels, 8 heads, a map of a sixteenth of the image. ``window``
is the published one, 14x14 pixels without overlap, which at 224 is the whole map. Ratios: row over ``full``.

    python benchmarks/swa_memory.py [--batch 1] [--runs 5] [--sizes 224 512 1024] [--out FILE]
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from flax import nnx
from lib.timing import interleaved

from evmamba_jax.analysis import flops_by_operation
from evmamba_jax.layers.attention import Attention
from evmamba_jax.layers.sliding_window import SlidingWindowAttention
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.models.mambavision import from_windows, to_windows

WIDTH, HEADS, STRIDE, WINDOW = 320, 8, 16, 14


class InWindows(nnx.Module):
    """Attention of maps (B, H, W, C) cut into windows."""

    def __init__(self, window: int):
        self.window = window
        self.attention = Attention(WIDTH, HEADS, rngs=nnx.Rngs(0))
        self.in_channels = WIDTH

    def __call__(self, x: jax.Array) -> jax.Array:
        return from_windows(self.attention(to_windows(x, self.window)), self.window, *x.shape[1:3])


class Sliding(SlidingWindowAttention):
    """Attention over sliding windows."""

    def __init__(self, radius: int):
        super().__init__(WIDTH, HEADS, radius=radius, rngs=nnx.Rngs(0))
        self.in_channels = WIDTH


def layers(side: int) -> dict[str, nnx.Module]:
    """Return what is compared, for a map of this side."""
    sliding = {f"sliding, r = {radius}": Sliding(radius) for radius in (3, 7)}
    return {"full": InWindows(side), "window": InWindows(WINDOW), **sliding}


def programs(layer: nnx.Module, shape: tuple[int, ...]):
    """Return the compiled forward, and the compiled forward and backward, with their arguments."""
    structure, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), shape)

    def forward(params, x):
        return nnx.merge(structure, params)(x)

    def both(params, x):
        y, pull = jax.vjp(forward, params, x)
        return y, pull(y)

    return {
        what: (jax.jit(run).lower(params, x).compile(), (params, x))
        for what, run in (("forward", forward), ("forward + backward", both))
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each program (default 5)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024], help="pixels of the image")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "Attention in windows, over the whole map, and over sliding windows",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "jaxlib", "flax"),
        date=machine.today(),
    )
    report.text(
        f"One attention layer of MambaVision-T's third stage, projections included: {WIDTH} channels, {HEADS} heads, "
        f"batch {options.batch}, float32. Multiply-adds are of one image; attention's are the products of queries, "
        "keys and values, with the halo of each tile. Temporary bytes as the compiler reports them; median of "
        f"{options.runs} interleaved runs. `window` is {WINDOW}x{WINDOW} without overlap. Ratios: row over full."
    )
    report.table(
        ("image", "{}"),
        "attention",
        "pass",
        ("attention, M multiply-adds", "{:.1f}"),
        ("all, M multiply-adds", "{:.1f}"),
        ("temporaries, MiB", "{:.1f}"),
        ("ratio", "{:.2f}"),
        ("seconds", "{:.4f}"),
        ("ratio", "{:.2f}"),
    )
    for size in options.sizes:
        side = size // STRIDE
        compared = layers(side)
        shape = (options.batch, side, side, WIDTH)
        compiled = {(n, what): p for n, layer in compared.items() for what, p in programs(layer, shape).items()}
        times = interleaved(
            {key: lambda p=p, args=args: jax.block_until_ready(p(*args)) for key, (p, args) in compiled.items()},
            options.runs,
        )
        memory = {key: p.memory_analysis().temp_size_in_bytes / 2**20 for key, (p, _) in compiled.items()}
        for what in ("forward", "forward + backward"):
            for name, layer in compared.items():
                counted = flops_by_operation(layer, side)
                key, peer = (name, what), ("full", what)
                multiply_adds = counted["attention"] / 1e6, sum(counted.values()) / 1e6
                ratios = memory[key] / memory[peer], times[key] / times[peer]
                report.row(size, name, what, *multiply_adds, memory[key], ratios[0], times[key], ratios[1])


if __name__ == "__main__":
    main()
