"""GPUs that are not there, described for XLA's GPU compiler.

It compiles for them without one, as far as that goes: which libraries and block sizes are fastest it finds out by
trying, and so not here. What comes out is whether the step compiles, its memory and its exchanges; no time.
"""

import importlib.util
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax.errors import UserError

# From openxla/xla, xla/backends/gpu/target_config/specs; NVIDIA's data sheets agree: memory (bytes), its bandwidth
# (bytes/s), multiprocessors, float32 units in each, clock (GHz), shared memory (bytes a multiprocessor), L2 (bytes),
# compute capability.
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000, 108, 64, 1.41, 167936, 41943040, 8),
    "h100": ("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000, 132, 128, 1.98, 233472, 52428800, 9),
    "h200": ("NVIDIA H200", 151397597184, 4800000000000, 132, 128, 1.98, 233472, 52428800, 9),
}
_NEEDED = {
    "jax_plugins.xla_cuda13": f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}",
    "nvidia.cu13": "nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink",
}
_HOST = 8  # GPUs of one host
_SHARE = 0.75  # of the memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


def is_gpu(name: str) -> bool:
    """Return whether a topology's name names a GPU."""
    return name.partition("-")[0] in GPUS


def parse_name(name: str) -> tuple[str, int]:
    """Return the kind and the number of GPUs of ``h100``, ``a100-8`` or ``h200-16``.

    Raises:
        UserError: a number that does not fill hosts of eight.
    """
    kind, _, number = name.partition("-")
    count = int(number or 1) if re.fullmatch(r"\d*", number) else 0
    if not 0 < count <= _HOST and (count < 1 or count % _HOST):
        raise UserError(f"--topology: {name!r} is not {kind}-N with N from 1 to {_HOST} or a multiple of {_HOST}")
    return kind, count


def target(name: str) -> dict[str, Any]:
    """Describe GPUs as :mod:`evmamba_jax.preflight.program` needs them.

    Raises:
        UserError: a number of GPUs that is not possible.
        ImportError: XLA's GPU compiler is not installed.
    """
    kind, count = parse_name(name)
    _require_compiler()
    title, memory, *_ = GPUS[kind]
    hosts = max(1, count // _HOST)
    return {
        "platform": "cuda",
        "compiler": ("XLA for CUDA of jaxlib", jax.lib.__version__),
        "devices": _devices(kind, hosts, count // hosts),
        "generation": title,
        "chips": count,
        "hosts": hosts,
        "slices": 1,
        "available": int(_SHARE * memory),
    }


def kernel_ptx(function: Callable[..., Any], kind: str, arrays: Sequence[Any]) -> str:
    """Return the PTX of the one scan kernel of a function, compiled for one GPU; arrays may be trees, or shapes."""
    _require_compiler()
    mesh = Mesh(np.array(_devices(kind, 1, 1)), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), list(arrays))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        jax.jit(function).lower(*shapes).compile(compiler_options={"xla_dump_to": folder})
        [text] = [text for text in (file.read_text() for file in Path(folder).glob("*.ptx")) if ".entry scan_" in text]
    return text


def _devices(kind: str, hosts: int, of_host: int) -> tuple[Any, ...]:
    title, memory, bandwidth, cores, units, clock, shared, cache, capability = GPUS[kind]
    config = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
          cuda_compute_capability {{ major: {capability} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 minor: 0 }}
        device_description_str: "{title}"
    """
    described = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x{hosts}x{of_host}")
    return tuple(described.devices)


def _require_compiler() -> None:
    missing = []
    for module, packages in _NEEDED.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # not even its parent is there
            found = None
        if found is None:
            missing.append(packages)
    if missing:
        raise ImportError(
            f"the GPU compiler is not installed: pip install {' '.join(missing)} "
            '(in a clone: pip install -e ".[preflight-cuda]"); it needs no GPU'
        )
