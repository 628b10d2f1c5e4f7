"""What a scan takes on Mosaic GPU, beside ours on Triton: compiled for an H200 that is not there. Nothing runs.

Pallas for Triton is deprecated. This compiles ``selective_scan``'s forward pass on both ways to a GPU. The kernel for
Mosaic GPU is a trial: it does the same for each token, and reads as far ahead, but for whole turns of tokens and whole
blocks of channels only; its results have not been compared with anything.

    pip install jax==0.10.2 -e ".[preflight-cuda]" nvidia-cuda-nvdisasm
    python benchmarks/gpu_mosaic.py [--out FILE]
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # before the plugin looks for a GPU

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from lib.gpu_assembly import Assembled, assemble
from lib.gpu_scans import BATCH, SHAPES, arrays, described

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.preflight.gpu import kernel_ptx, target
from pallas_kernels import gpu
from pallas_kernels.gpu import walks
from pallas_kernels.gpu.tokens import ARTANH

WARPS = 4  # of a warpgroup, the least that Mosaic GPU computes with
WAYS = {  # by shape: channels a thread, and whether B and C are read a turn ahead
    "VMamba-T stage 3": [(1, True), (2, True)],
    "VMamba-T stage 4": [(1, True), (2, True)],
    "Vim-S": [(1, True), (1, False)],
}


def softplus(raw: jax.Array) -> jax.Array:
    """Return the softplus of ``pallas_kernels/gpu/tokens.py``."""
    e = jnp.exp2(jnp.abs(raw) * -math.log2(math.e))
    z = e / (2 + e)
    square = z * z
    series = jnp.full_like(z, ARTANH[0])
    for coefficient in ARTANH[1:]:
        series = series * square + coefficient
    return series * z + jnp.maximum(raw, 0)


def mosaic_scan(length: int, groups: int, channels: int, state: int, *, width: int, turn: int, few_ahead: bool):
    """Return the forward scan for Mosaic GPU.

    Args:
        length: tokens.
        groups: of channels.
        channels: of a group.
        state: N.
        width: channels of a program.
        turn: tokens of a turn.
        few_ahead: whether B and C are read a turn ahead, as the rows are.
    """
    layout = plgpu.Layout.WG_STRIDED((width,), width // (32 * WARPS))

    def kernel(tokens, u, delta, A, B, C, D, bias, y, final):
        image, group, block = (lax.axis_index(name) for name in ("image", "group", "block"))
        own = pl.ds(block * width, width)

        def row(ref, *at):
            return plgpu.load(ref, (*at, own), layout=layout, optimized=False)

        def columns(pixel):
            return [[ref[image, pixel, group, n] for n in range(state)] for ref in (B, C)]

        def ask(i):
            codes = [tokens[group, i * turn + k] for k in range(turn)]
            pixels = [lax.shift_right_arithmetic(code, jnp.int32(walks.BITS)) for code in codes]
            rows = [[row(ref, image, pixel, group) for ref in (u, delta)] for pixel in pixels]
            return pixels, rows, [columns(pixel) for pixel in pixels] if few_ahead else None

        As, D_own, bias_own = [row(A, group, n) for n in range(state)], row(D, group), row(bias, group)

        def one(i, carry):
            (pixels, rows, few), states = carry
            following = ask(jnp.minimum(i + 1, length // turn - 1))
            for k, pixel in enumerate(pixels):
                x, raw = (value.astype(jnp.float32) for value in rows[k])
                dt = softplus(raw + bias_own)
                total, after = D_own * x, []
                for A_own, state_own, b, c in zip(As, states, *(few[k] if few_ahead else columns(pixel)), strict=True):
                    after.append(jnp.exp2(dt * A_own) * state_own + dt * x * b.astype(jnp.float32))
                    total = after[-1] * c.astype(jnp.float32) + total
                states = tuple(after)
                y[image, pixel, group, own] = total
            return following, states

        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        _, states = lax.fori_loop(0, length // turn, one, (ask(jnp.int32(0)), (zero,) * state))
        for n in range(state):
            final[image, group, n, own] = states[n]

    shapes = (BATCH, length, groups, channels), (BATCH, groups, state, channels)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(BATCH, groups, channels // width),
        grid_names=("image", "group", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def given(shape: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the abstract arguments of a scan alone."""
    _, alone = jax.eval_shape(lambda: arrays(*SHAPES[shape]))
    return alone


def mosaic_code(shape: str, **form) -> Assembled:
    """Compile the kernel for Mosaic GPU."""
    u, delta, A, B, C, D, bias = given(shape)
    mesh = Mesh(np.array(target("h200")["devices"]), ("data",))
    tokens = jax.ShapeDtypeStruct((u.shape[2], u.shape[1]), jnp.int32)
    everywhere = NamedSharding(mesh, PartitionSpec())
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in (tokens, u, delta, A, B, C, D, bias)]
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        jax.jit(mosaic_scan(*u.shape[1:], A.shape[1], **form)).lower(*inputs).compile()
        [text] = Path(folder).glob("*.ptx")
        return assemble(text.read_text(), disassemble=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    versions = machine.versions("jax", "jaxlib")
    title = "A scan on Mosaic GPU and on Triton: compiled, not run"
    report = Report(title, options.out, versions=versions, date=machine.today())
    report.text(
        f"`selective_scan` forward, batch {BATCH}, bfloat16, for an H200: registers of a thread, bytes spilled, and "
        "the instructions of the longest loop for 32 channels of a token. The kernel for Mosaic GPU is a trial; ours "
        "also fills up the last turn. Written by `benchmarks/gpu_mosaic.py`."
    )
    counts = [("channels of a program", "{}"), ("tokens a turn", "{}"), ("registers", "{}"), ("spilled, bytes", "{}")]
    report.table("shape", "way", *counts, ("instructions", "{:.1f}"))
    for shape, ways in WAYS.items():
        alone = given(shape)
        start = jax.ShapeDtypeStruct((BATCH, *alone[2].shape), jnp.float32)
        forms = {"delta_softplus": True, "reverse": False}
        with use_abstract_mesh(described()):
            program = gpu.SELECTIVE_SCAN.plan(*alone, start, **forms).forward
        forward, _ = gpu.SELECTIVE_SCAN.passes(**forms)
        code, turn = assemble(kernel_ptx(forward, "h200", (*alone, start)), disassemble=True), program.tokens_a_turn
        figures = [program.width, turn, code.registers, code.spilled]
        report.row(shape, "Triton", *figures, code.longest_loop / turn / (program.width / 32))
        for each, few_ahead in ways:
            width = 32 * WARPS * each
            code = mosaic_code(shape, width=width, turn=turn, few_ahead=few_ahead)
            way = "Mosaic GPU" if few_ahead else "Mosaic GPU, B and C read where they are used"
            report.row(shape, way, width, turn, code.registers, code.spilled, code.longest_loop / turn / each)


if __name__ == "__main__":
    main()
