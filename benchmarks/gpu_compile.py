r"""Registers and spills of the GPU kernels, from the real compiler, without a GPU. Nothing runs.

XLA compiles for a GPU that it is told about; ptxas then says what a program needs. This takes JAX 0.10.2: 0.12 compiles
the kernels too, but does not write down their PTX when asked in the same way.

    pip install jax==0.10.2 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 \
        nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink
    python benchmarks/gpu_compile.py [--out FILE]
"""

import argparse
import datetime
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # before the plugin looks for a GPU

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from gpu_scan import BATCH, SHAPES
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import gpu

# Multiprocessors, capability, shared memory of a multiprocessor and of a block (bytes), memory (bytes), bytes/s: from
# NVIDIA's data sheets and the table of compute capabilities in the CUDA programming guide.
GPUS = {
    "NVIDIA A100-SXM4-40GB": (108, (8, 0), 167936, 166912, 40 << 30, 1555 * 10**9),
    "NVIDIA H100 80GB HBM3": (132, (9, 0), 233472, 232448, 80 << 30, 3350 * 10**9),
    "NVIDIA H200": (132, (9, 0), 233472, 232448, 141 << 30, 4800 * 10**9),
}


def target(name):
    """Return a GPU as XLA wants it described."""
    cores, (major, minor), shared, shared_of_block, memory, bandwidth = GPUS[name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores} fpus_per_core: 64 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_of_block} shared_memory_per_core: {shared}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {40 << 20} clock_rate_ghz: 1.4
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def arguments(orders, height, width, channels, rank, state):
    """Return the arguments of ``scan2d``, abstract."""
    like, sets = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), len(orders)
    return (
        jax.ShapeDtypeStruct((BATCH, height, width, channels), jnp.bfloat16),
        like((sets, channels, rank + 2 * state)),
        like((sets, rank, channels)),
        like((sets, channels)),
        like((sets, channels, state)),
        like((sets, channels)),
    )


def ptx(function, name, shapes):
    """Return the PTX of the one kernel of a function compiled for a GPU."""
    device = topologies.get_topology_desc(platform="cuda", target_config=target(name), topology="1x1x1").devices[0]
    mesh = Mesh(np.array([device]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        jax.jit(function).lower(*shapes).compile(compiler_options={"xla_dump_to": folder})
        [text] = [text for text in (file.read_text() for file in Path(folder).glob("*.ptx")) if ".entry scan_" in text]
    return text


def assembled(text):
    """Return (registers, bytes spilled, bytes filled) of a kernel."""
    [ptxas] = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/*/bin/ptxas")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ptx").write_text(text)
        architecture = re.search(r"\.target (\w+)", text)[1]
        command = [ptxas, "-v", f"-arch={architecture}", "ptx", "-o", "cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return int(re.search(r"Used (\d+) registers", said)[1]), int(spills[1]), int(spills[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    lines = [
        "# GPU kernels: compiled, not run",
        "",
        f"What ptxas says of `scan2d`, batch {BATCH}, bfloat16, as XLA compiles it for GPUs that are not there: the "
        "registers of a thread (255 at most), and the bytes that it writes to and reads from memory for want of more, "
        "counted once for each place in the program.",
        "",
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}; {datetime.date.today().isoformat()}; written by "
        "`benchmarks/gpu_compile.py`.",
        "",
        "| GPU | shape | pass | registers | spilled, bytes | read back, bytes |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for name in GPUS:
        for shape, (orders, *sizes) in SHAPES.items():
            own = arguments(orders, *sizes)
            for kind, function, inputs in (
                ("forward", gpu.scan2d_forward, own),
                ("backward", gpu.scan2d_backward, (*own, own[0])),
            ):
                figures = assembled(ptx(functools.partial(function, orders=orders), name, inputs))
                lines.append(f"| {name} | {shape} | {kind} | {' | '.join(map(str, figures))} |")
                print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
