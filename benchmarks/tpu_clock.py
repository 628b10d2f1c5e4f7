"""The preflight's clock beside what is known otherwise, program by program; nothing runs on a TPU.

Programs whose least work can be counted are compiled by the real TPU compiler and timed as the preflight times a train
step: matrix products, one pass over an array, LayerNorm, GELU, softmax, a depthwise convolution, sorting.

    python benchmarks/tpu_clock.py [--generations v5e v6e] [--out FILE]
"""

import argparse
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.preflight import aot, hlo
from evmamba_jax.preflight.clock import ATTAINABLE, UNCERTAINTY, clock
from evmamba_jax.preflight.floor import REGISTER, VECTOR_UNITS

FREE = Format(Layout.AUTO)  # the compiler chooses
# Milliseconds of XLA's products of two square bfloat16 matrices on a v5e, by hardware: docs.jax.dev/en/latest/pallas/
# tpu/matmul.html times calls from Python. The one of 1024 columns, 0.119, is nearly all dispatch, and is taken off.
DISPATCH = 0.11943 - 2e3 * 1024**3 / 197e12
TIMED = {("v5e", 4096): 0.82729 - DISPATCH, ("v5e", 8192): 6.04715 - DISPATCH}

ABOUT = f"""\
Each program is compiled for one chip with the layouts that the compiler likes best, bfloat16 unless said otherwise.

- **counted, ms**: the least time of the unit named, by what the program has to compute. Products: the published peak.
  Vector: operations of the optimized program for each number, one each, also for a conversion; a 3x3 depthwise
  convolution 18 for each result; sorting 1024 numbers by a network of 55 layers; in each a pair takes its
  comparison and four choices. {VECTOR_UNITS * REGISTER} a cycle, although v6e can take two bfloat16 numbers at once.
  Exponentials, logarithms, roots and divisions: {REGISTER} a cycle.
- **schedule, ms**: of all instructions. **over**: over the count.
- **counted, MB**: what comes in and goes out, once. **MB**: what the clock counts. **over**: over the count; a program
  of several passes reads its argument more than once, or keeps it on the chip.
- **clock, ms**: of each instruction the longer of schedule and memory ({ATTAINABLE:.0%} of the peak), and transfers for
  which something waits: here mostly of an argument at the start, which in a train step others hide.
- **XLA, ms**: `estimated_cycles`, which the preflight no longer takes.
- **timed, ms**: on a v5e, by JAX's documentation of Pallas, without {DISPATCH:.3f} ms of dispatch.
"""


@dataclasses.dataclass(frozen=True)
class Known:
    """A program, and what it cannot do without.

    Attributes:
        name: of the row.
        function: the program.
        shapes: of its arguments.
        moved: bytes to and from main memory.
        products: multiply-adds of the matrix units.
        vector: operations of the vector units; None: counted in the optimized program.
        side: rows and columns of square matrices, else 0.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    moved: int
    products: int = 0
    vector: int | None = None
    side: int = 0


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def product(rows: int, inner: int, columns: int) -> Known:
    """Return a matrix product."""
    return Known(
        name=f"product {rows}x{inner}x{columns}",
        function=jnp.matmul,
        shapes=(shape(rows, inner), shape(inner, columns)),
        moved=2 * (rows * inner + inner * columns + rows * columns),
        products=rows * inner * columns,
        vector=0,
        side=rows if rows == inner == columns else 0,
    )


def layer_norm(x):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def both(function):
    """Return a function's gradient, which computes the function again."""
    return lambda x, dy: jax.vjp(function, x)[1](dy)[0]


def depthwise(x, kernel):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names, feature_group_count=x.shape[-1])


def depthwise_gradient(x, kernel, dy):
    return jax.vjp(lambda kernel: depthwise(x, kernel), kernel)[1](dy)[0]


IMAGES, ROWS, MAPS, KERNEL = shape(128, 56, 56, 96), shape(25088, 1024), shape(128, 28, 28, 192), shape(3, 3, 1, 192)
LINES = shape(4096, 1024, dtype=jnp.float32)
SIZE = {of: math.prod(of.shape) for of in (IMAGES, ROWS, MAPS, LINES)}
LAYERS = 55  # of a network that sorts 1024 numbers
# For both numbers of a pair and their places, what the comparison of XLA's order of floats takes, and the choices.
A_PAIR = 20 + 4
KNOWN = (
    *(product(*sizes) for sizes in ((4096,) * 3, (8192,) * 3, (100352, 192, 768), (25088, 384, 1536))),
    Known("one pass, times 2", lambda x: x * 2, (IMAGES,), 4 * SIZE[IMAGES]),
    Known("LayerNorm", layer_norm, (IMAGES,), 4 * SIZE[IMAGES]),
    Known("LayerNorm, both passes", both(layer_norm), (IMAGES, IMAGES), 6 * SIZE[IMAGES]),
    Known("GELU, exact", gelu, (IMAGES,), 4 * SIZE[IMAGES]),
    Known("GELU, exact, both passes", both(gelu), (IMAGES, IMAGES), 6 * SIZE[IMAGES]),
    Known("softmax", jax.nn.softmax, (ROWS,), 4 * SIZE[ROWS]),
    Known("depthwise 3x3", depthwise, (MAPS, KERNEL), 4 * SIZE[MAPS], vector=18 * SIZE[MAPS]),
    Known(
        "depthwise 3x3, gradient of weights",
        depthwise_gradient,
        (MAPS, KERNEL, MAPS),
        4 * SIZE[MAPS],
        vector=18 * SIZE[MAPS],
    ),
    Known(
        "sort, float32", lambda x: jnp.sort(x, -1), (LINES,), 8 * SIZE[LINES], vector=A_PAIR * LAYERS * SIZE[LINES] // 2
    ),
)

# What computes nothing, and what the unit for exponentials computes.
MOVES = {
    *("parameter", "constant", "broadcast", "bitcast", "tuple", "get-tuple-element", "copy", "reshape", "transpose"),
    *("fusion", "iota", "slice", "pad", "copy-start", "copy-done", "convolution"),
}
EXPONENTIALS = {"exponential", "log", "rsqrt", "sqrt", "tanh", "divide"}


def operations(program: hlo.Program) -> tuple[int, int]:
    """Return the operations of a program without loops, of the vector units and of that for exponentials."""
    counts = [0, 0]

    def every(computation: str) -> Iterator[hlo.Instruction]:
        for one in program.computations[computation]:
            yield one
            if one.opcode == "fusion":
                yield from every(one.calls)

    for one in every(program.entry):
        if one.opcode not in MOVES:
            # A sum takes what it is given.
            of = program.by_name[one.operands[0]] if one.opcode == "reduce" else one
            numbers = sum(math.prod(map(int, array.text.partition("[")[2][:-1].split(","))) for array in of.result[:1])
            counts[one.opcode in EXPONENTIALS] += numbers
    return counts[0], counts[1]


def row(known: Known, generation: aot.Generation, dump_folder: str) -> list[Any]:
    """Compile a program and return its row."""
    compiled = aot.compile_for(generation.name, known.function, *known.shapes, in_shardings=FREE, out_shardings=FREE)
    program = hlo.parse(compiled.as_text() or "")
    items = clock(program, dump_folder, generation.name)
    vector, exponentials = (known.vector, 0) if known.vector is not None else operations(program)
    rate = REGISTER * generation.clock
    limits = {
        "products": 2 * known.products / generation.bf16_flops,
        "vector": vector / (VECTOR_UNITS * rate),
        "exponentials": exponentials / rate,
    }
    unit, least = max(limits.items(), key=lambda limit: limit[1])
    found, _ = hlo.runs(program)
    xla = [int(run.instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0) for run in found]
    schedule, moved = sum(item.schedule or 0.0 for item in items), sum(item.bytes for item in items)
    return [
        *(known.name, generation.name, unit, 1e3 * least, 1e3 * schedule, schedule / least),
        *(known.moved / 1e6, moved / 1e6, moved / known.moved, 1e3 * sum(item.seconds for item in items)),
        *(1e3 * sum(cycles for cycles in xla if cycles < 2**40) / generation.clock,),
        *(TIMED.get((generation.name, known.side)),),
    ]


def fill(report: Report, dump_folder: str, generations: list[str]) -> None:
    """Add everything."""
    report.text(f"{UNCERTAINTY}\n\n{ABOUT}")
    ms, over = "{:.3f}", ("over", "{:.2f}")
    report.table(
        *("program", "TPU", "unit", ("counted, ms", ms), ("schedule, ms", ms), over),
        *(("counted, MB", "{:.1f}"), ("MB", "{:.1f}"), over, ("clock, ms", ms), ("XLA, ms", ms), ("timed, ms", ms)),
    )
    for name in generations:
        for known in KNOWN:
            report.row(*row(known, aot.GENERATIONS[name], dump_folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", nargs="+", default=["v5e", "v6e"], choices=list(aot.GENERATIONS))
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump_folder:
        aot.prepare(dump_folder)
        title = "The preflight's clock: what it was compared with"
        versions = machine.versions("jax", "jaxlib", "libtpu")
        report = Report(title, options.out, versions=versions, date=machine.today())
        fill(report, dump_folder, options.generations)


if __name__ == "__main__":
    main()
