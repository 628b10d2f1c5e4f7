"""What ``analysis throughput`` adds to what it measures: a program of known duration, by its clock and by a plain loop.

The program is a chain of matrix products, compiled once; so many products give steps from a fraction of a millisecond
to some tens. Both sides run it in the same process in turns, each round with as many steps: the command's side is
``analysis.speed.Program.measure``, the other a loop around the compiled function.

    python benchmarks/throughput_overhead.py [--rounds 31] [--out FILE]
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from evmamba_jax.analysis.speed import Program
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.measuring.rounds import spread, steps_for, take_turns, warmed_up

SIDE = 128
PRODUCTS = (1, 10, 100)


def chain(count: int):
    """Return the compiled chain of so many products."""
    matrix = jnp.eye(SIDE) * 0.999

    def run(x):
        return jax.lax.fori_loop(0, count, lambda _, x: x @ matrix, x)

    return jax.jit(run).lower(matrix).compile(), matrix


def by_hand(run, x, steps: int) -> float:
    """Return the mean seconds of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        out = run(x)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "What `analysis throughput` adds to what it measures",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax"),
        date=machine.today(),
    )
    report.text(
        f"Chains of products of {SIDE}x{SIDE} matrices in float32, {options.rounds} rounds, in which a plain loop and "
        "the command's clock take turns. Overhead: the command's seconds over the loop's, less one: of the medians, "
        "and the quartiles of the rounds. Written by `benchmarks/throughput_overhead.py`."
    )
    report.table(
        ("products", "{}"),
        ("steps a round", "{}"),
        ("plain loop, ms a step", "{:.4f}"),
        ("the command, ms a step", "{:.4f}"),
        ("overhead, %", "{:+.2f}"),
        ("its quartiles", "{:+.2f} to {:+.2f}"),
    )
    for count in PRODUCTS:
        run, x = chain(count)
        program = Program(functools.partial(run, x), batch=1, needed=0, compile_seconds=0.0, multiply_adds=0)
        _, steps = steps_for(0.2 * options.rounds, warmed_up(program.measure), options.rounds)
        sides = {
            "loop": lambda run=run, x=x, n=steps: by_hand(run, x, n),
            "ours": functools.partial(program.measure, steps),
        }
        times = take_turns(sides, options.rounds)
        loop, ours = (1e3 * spread(times[side]).median for side in ("loop", "ours"))
        rounds = spread([100 * (b / a - 1) for a, b in zip(times["loop"], times["ours"], strict=True)])
        report.row(count, steps, loop, ours, 100 * (ours / loop - 1), [rounds.low, rounds.high])


if __name__ == "__main__":
    main()
