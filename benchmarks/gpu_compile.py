r"""Registers and spills of the GPU kernels, from the real compiler, without a GPU. Nothing runs.

XLA compiles for a GPU that it is told about; ptxas then says what a program needs. This takes JAX 0.10.2: 0.12 compiles
the kernels too, but does not write down their PTX when asked in the same way.

    pip install jax==0.10.2 -e ".[preflight-cuda]"
    python benchmarks/gpu_compile.py [--out FILE]
"""

import argparse
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # before the plugin looks for a GPU

import jax
from lib.gpu_assembly import assemble
from lib.gpu_scans import BATCH, compiled_shapes

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.preflight.gpu import GPUS, kernel_ptx


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    versions = machine.versions("jax", "jaxlib")
    report = Report("GPU kernels: compiled, not run", options.out, versions=versions, date=machine.today())
    report.text(
        f"What ptxas says of `scan2d`, batch {BATCH}, bfloat16, as XLA compiles it for GPUs that are not there: the "
        "registers of a thread (255 at most), and the bytes that it writes to and reads from memory for want of more, "
        "counted once for each place in the program. Written by `benchmarks/gpu_compile.py`."
    )
    numbers = [("registers", "{}"), ("spilled, bytes", "{}"), ("read back, bytes", "{}")]
    report.table("GPU", "shape", "pass", *numbers)
    for kind, (name, *_) in GPUS.items():
        for shape, passes in compiled_shapes():
            for direction, (function, inputs) in passes.items():
                code = assemble(kernel_ptx(function, kind, inputs))
                report.row(name, shape, direction, code.registers, code.spilled, code.filled)


if __name__ == "__main__":
    main()
