"""Compile for TPUs that are not there.

libtpu holds the whole TPU compiler and needs no TPU: JAX lowers for the devices of a described topology, and libtpu
compiles, refuses what does not fit, and on request writes down the schedule of every kernel. Nothing runs, so whatever
is read here is the compiler's estimate. What compiles, memory, spills and loads on the units are facts of the program;
times are not checked on hardware, and waiting for memory is not in them.

    aot.prepare("dump")                              # first: libtpu reads its options when it is loaded
    compiled = aot.compile_for("v5e", kernel, jax.ShapeDtypeStruct((784, 16, 128), "float32"))
    print(schedules.read("dump", "name_of_the_pallas_call", "v5e"))
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GIB = 2**30

# The two files of each kernel that are written: its instructions by region and row of the timeline after register
# allocation, and the number of instructions that each row issues to each unit.
TIMELINE = "post-bundle-packing-post-ra"
LOADS = "pre-delay_hlo-static-per-bundle-utilization"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What Google publishes about a kind of TPU; all per chip unless said otherwise.

    Attributes:
        name: as in a topology's name.
        hbm_bytes: memory.
        available: bytes of it that the compiler lets a program have on one JAX device.
        hbm_bandwidth: bytes/s to and from it.
        bf16_flops: peak multiply-adds in bfloat16, counted as two operations each, 1/s.
        vmem_bytes: on-chip vector memory of one TensorCore.
        macs: bfloat16 multiply-adds a cycle of one TensorCore's matrix units.
        cores: TensorCores a chip.
        cores_per_device: TensorCores of one JAX device; v4 and v5p join two ("megacore").
        counts_cores: whether the number in a topology's name counts TensorCores instead of chips.
        ici_bandwidth: bytes/s of one chip to all its neighbours, both directions together.
        largest: chips of the largest slice.
    """

    name: str
    hbm_bytes: int
    available: int
    hbm_bandwidth: float
    bf16_flops: float
    vmem_bytes: int
    macs: int
    cores: int
    cores_per_device: int
    counts_cores: bool
    ici_bandwidth: float
    largest: int

    @property
    def clock(self) -> float:
        """Cycles a second, which are not published: the peak over what the matrix units do in a cycle."""
        return self.bf16_flops / (2 * self.macs * self.cores)

    @property
    def devices_per_chip(self) -> int:
        """JAX devices a chip."""
        return self.cores // self.cores_per_device


# cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x: HBM, bandwidth, bf16 peak, TensorCores, ICI, pod size.
# VMEM: jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2. Multiply-adds a cycle: the compiler's own schedule of a
# product of two 4096x4096 matrices comes to 81 to 97 % of these figures. What the compiler leaves to a program: its
# refusals (libtpu 0.0.42 and 0.0.52).
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", 32 * GIB, int(30.75 * GIB), 1200e9, 275e12, 16 * 2**20, 4 * 128**2, 2, 2, True, 300e9, 4096),
        Generation("v5e", 16 * GIB, int(15.75 * GIB), 819e9, 197e12, 128 * 2**20, 4 * 128**2, 1, 1, False, 400e9, 256),
        Generation("v5p", 95 * GIB, int(95.73 * GIB), 2765e9, 459e12, 64 * 2**20, 4 * 128**2, 2, 2, True, 1200e9, 8960),
        Generation("v6e", 32 * GIB, int(31.24 * GIB), 1638e9, 918e12, 128 * 2**20, 4 * 256**2, 1, 1, False, 800e9, 256),
        Generation(
            "tpu7x", 192 * GIB, int(94.74 * GIB), 7380e9, 2307e12, 64 * 2**20, 4 * 256**2, 2, 1, True, 1200e9, 9216
        ),
    )
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}

# Slices of the two-dimensional generations; up to 8 chips lie on one host.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
# The small slices of the others; larger ones are made of cubes of 4x4x4 chips.
_CUBIC = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described, absent TPU system.

    Attributes:
        name: as asked for.
        generation: its kind of chip.
        shape: chips along each axis of one slice.
        slices: slices joined by the data-centre network.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.slices * (1 if self._is_one_host else math.prod(self.shape) // 4)

    @property
    def _is_one_host(self) -> bool:
        chips = math.prod(self.shape)
        return chips == 1 or (len(self.shape) == 2 and chips <= 8)  # larger slices have hosts of four chips

    @functools.cached_property
    def devices(self) -> tuple[Any, ...]:
        """JAX devices in their order, to build a mesh of. Raises ImportError where libtpu is not installed."""
        prepare()
        options: dict[str, Any] = {"num_slices": self.slices}
        if self._is_one_host:
            options["chips_per_host_bounds"] = (*self.shape, 1)[:3]
        if self.generation.name == "v4":
            options["chip_config_name"] = "megacore"
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{self.generation.name}:{'x'.join(map(str, self.shape))}", **options
        )
        return tuple(described.devices)


def prepare(dump_folder: str | os.PathLike[str] | None = None) -> None:
    """Set what libtpu reads when it is loaded, in this process; call it before anything else here.

    Args:
        dump_folder: where libtpu is to write the schedules that ``schedules.read`` reads; one folder a process.

    Raises:
        ImportError: libtpu is not installed.
        RuntimeError: libtpu has been loaded already, with other options.
    """
    if _prepared:
        if dump_folder is not None and _prepared != [os.fspath(dump_folder)]:
            raise RuntimeError(
                f"aot.prepare({os.fspath(dump_folder)!r}) comes too late: libtpu has been set up in this process with "
                f"{_prepared[0]!r}; call it before anything is compiled"
            )
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            'the TPU compiler is not installed: pip install "jax[tpu]" (in a clone: pip install -e ".[tpu]"); '
            "it needs no TPU, but Linux on x86-64"
        )
    for name, value in environment(dump_folder).items():
        if name == "LIBTPU_INIT_ARGS":
            value = f"{os.environ.get(name, '')} {value}".strip()
        elif name in os.environ:
            continue
        os.environ[name] = value
    _prepared.append(None if dump_folder is None else os.fspath(dump_folder))


_prepared: list[str | None] = []  # the dump folder of this process, once it is settled


def environment(dump_folder: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return the environment variables of a process that compiles: what :func:`prepare` sets, for a child process."""
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask which TPU this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do: the topology decides
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on a lock file
    }
    if dump_folder is not None:
        variables["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={os.fspath(dump_folder)} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
            f"--xla_jf_dump_llo_pass_label_regex=.*({TIMELINE}|{LOADS})"
        )
    return variables


def topology(name: str) -> Topology:
    """Describe a TPU system by the name Google gives it.

    Args:
        name: ``v5e-256`` (also ``v5litepod-256``), ``v6e-64``, ``v4-32``, ``v5p-128``, ``tpu7x-64``; the number counts
            chips of v5e and v6e, and TensorCores, two a chip, of the others. ``2xv5e-256`` is two slices. A name of a
            generation alone, ``v5e``, is one chip.

    Returns:
        The topology; libtpu is first needed by its ``devices``.

    Raises:
        ValueError: a name or size that does not exist.
    """
    match = re.fullmatch(r"(?:(\d+)x(?=v|t))?([a-z]+\d+[a-z]*)(?:-(\d+))?", name)
    family = match and _OTHER_NAMES.get(match[2], match[2])
    if not match or family not in GENERATIONS:
        raise ValueError(
            f"unknown topology {name!r}; there are v4-N, v5p-N and tpu7x-N (N TensorCores, two a chip), v5e-N and "
            "v6e-N (N chips), e.g. v5e-256, v4-32, and 2xv5e-256 for two slices"
        )
    generation = GENERATIONS[family]
    unit = generation.cores if generation.counts_cores else 1
    size = int(match[3] or unit)
    shapes: dict[int, tuple[int, ...]] = dict(_CUBIC if generation.counts_cores else _FLAT)
    if generation.counts_cores and size % (64 * unit) == 0 and 0 < size // unit <= generation.largest:
        shapes[size // unit] = tuple(4 * side for side in _cuboid(size // unit // 64))
    if size % unit or size // unit not in shapes or match[1] == "0":
        counted = "TensorCores, two a chip" if generation.counts_cores else "chips"
        sizes = ", ".join(str(unit * chips) for chips in sorted(shapes) if chips <= generation.largest)
        more = f", and multiples of {64 * unit} up to {unit * generation.largest}" if generation.counts_cores else ""
        raise ValueError(f"there is no topology {name!r}: {family}-N counts {counted}, and N is {sizes}{more}")
    return Topology(name, generation, shapes[size // unit], int(match[1] or 1))


def _cuboid(volume: int) -> tuple[int, int, int]:
    """Return the sides, ascending, of the most cube-like box of whole sides; Google's default shape of a slice."""
    sides = [
        (a, b, volume // (a * b))
        for a in range(1, math.isqrt(volume) + 1)
        for b in range(a, volume // a + 1)
        if volume % (a * b) == 0 and b <= volume // (a * b)
    ]
    return min(sides, key=sum)


def compile_for(
    generation: str,
    function: Callable[..., Any],
    *arguments: Any,
    compiler_options: Mapping[str, Any] | None = None,
    **jit_options: Any,
) -> jax.stages.Compiled:
    """Compile a function for one chip of a generation.

    Args:
        generation: a key of ``GENERATIONS``.
        function: what ``jax.jit`` takes, or its result.
        *arguments: pytrees of ``jax.ShapeDtypeStruct`` (arrays stand for their shapes).
        compiler_options: as in ``Lowered.compile``.
        **jit_options: as in ``jax.jit``, for instance ``donate_argnums``.

    Returns:
        The compiled function, with its ``memory_analysis()``, ``cost_analysis()`` and ``as_text()``; it cannot be run.

    Raises:
        ValueError: an unknown generation.
        ImportError: libtpu is not installed.
        jax.errors.JaxRuntimeError: the compiler's refusal, such as memory that does not suffice.
    """
    mesh = Mesh(np.array(topology(generation).devices[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    # The ambient mesh tells Pallas which chip it lowers for; without it, it asks this machine's own devices.
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, **jit_options).lower(*shapes)
        return lowered.compile(compiler_options=dict(compiler_options) if compiler_options else None)
