"""Time and temporary memory of every implementation of ``selective_scan`` on this CPU.

The peer is ``jax.lax.associative_scan`` over pairs of decay and input, the usual way to write a scan in JAX, in two
layouts of the state: ``associative``, ours, has (state, channels); ``associative, state last`` has (channels, state),
as the papers' formulas. Ratios say how many times slower, or larger, a peer is than the default.

    python benchmarks/scan_cpu.py [--runs 9] [--out FILE]
"""

import argparse
import functools
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from lib.timing import interleaved

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from pallas_kernels import selective_scan

# EfficientVMamba's scans at 224x224: (name, tokens of one sub-lattice, inner channels of one direction).
SHAPES = [
    ("T stage 1", 784, 96),
    ("T stage 2", 196, 192),
    ("B stage 1", 784, 192),
    ("B stage 2", 196, 384),
]
BATCH, DIRECTIONS, STATE = 4, 4, 16


def state_last(u, delta, A, B, C, D, *, delta_bias, delta_softplus):
    """Associative scan with the state as (channels, state), as in the papers' formulas."""
    batch, length, _ = u.shape
    dt = jax.nn.softplus(delta + delta_bias) if delta_softplus else delta + delta_bias
    dt, u_ = (x.reshape(batch, length, DIRECTIONS, -1, 1) for x in (dt, u))
    decays = jnp.exp(dt * A.reshape(DIRECTIONS, -1, STATE))
    inputs = dt * u_ * B[:, :, :, None]
    _, state = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decays, inputs), axis=1)
    return (state * C[:, :, :, None]).sum(-1).reshape(u.shape) + D * u


SCANS = {
    "sequential (default)": selective_scan,
    "associative": functools.partial(selective_scan, implementation="associative"),
    "associative, state last": state_last,
}


def arguments(length, share):
    rng = np.random.default_rng(0)
    channels = DIRECTIONS * share
    arrays = (
        rng.normal(size=(BATCH, length, channels)),
        rng.normal(size=(BATCH, length, channels)),
        -np.tile(np.arange(1.0, STATE + 1), (channels, 1)),
        rng.normal(size=(BATCH, length, DIRECTIONS, STATE)),
        rng.normal(size=(BATCH, length, DIRECTIONS, STATE)),
        np.ones(channels),
        rng.normal(-4, 1, channels),
    )
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def programs(scan, args):
    """Return the compiled forward, and the compiled forward and backward, of one implementation."""

    def forward(u, delta, A, B, C, D, bias):
        return scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

    def both(dy, *args):
        y, pull = jax.vjp(forward, *args)
        return y, pull(dy)

    return {
        "forward": (jax.jit(forward).lower(*args).compile(), args),
        "forward + backward": (jax.jit(both).lower(args[0], *args).compile(), (args[0], *args)),
    }


def measure(length, share, runs):
    """Return {(implementation, pass): (median milliseconds, temporary MiB)}; runs are interleaved."""
    args = arguments(length, share)
    compiled = {(name, what): p for name, scan in SCANS.items() for what, p in programs(scan, args).items()}

    def run(program, inputs):
        return lambda: jax.block_until_ready(program(*inputs))

    times = interleaved({key: run(*pair) for key, pair in compiled.items()}, runs)
    return {
        key: (1e3 * times[key], program.memory_analysis().temp_size_in_bytes / 2**20)
        for key, (program, _) in compiled.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each program (default 9)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "Selective scan on a CPU",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "jaxlib"),
        date=machine.today(),
    )
    report.text(
        f"Batch {BATCH}, {DIRECTIONS} directions (groups), N = {STATE}, float32, softplus, bias and D. Median of "
        f"{options.runs} interleaved runs; temporary bytes as the compiler reports them. Ratios: row over default."
    )
    numbers = [("ms", "{:.1f}"), ("ratio", "{:.1f}"), ("temporaries, MiB", "{:.1f}"), ("ratio", "{:.1f}")]
    report.table("shape (tokens x channels)", "pass", "implementation", *numbers)
    for shape, length, share in SHAPES:
        results = measure(length, share, options.runs)
        for what in ("forward", "forward + backward"):
            for name in SCANS:
                (ms, mib), (base_ms, base_mib) = results[name, what], results["sequential (default)", what]
                sizes = f"{shape} ({length} x {DIRECTIONS}x{share})"
                report.row(sizes, what, name, ms, ms / base_ms, mib, mib / base_mib)


if __name__ == "__main__":
    main()
