"""Reads a compiled step's text (optimized HLO): how often each instruction runs, arrays, collectives."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([^ ]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%([^ ]+) \(.*\) -> .* \{$")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# What makes no array of its own: names for others' results, and buffers that a later instruction fills.
_ALIASES = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "optimization-barrier"),
    *("constant", "dynamic-update-slice", "after-all", "partition-id", "copy-start", "async-start", "async-update"),
    *("send", "send-done", "recv"),
}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as it lies in memory.

    Attributes:
        text: type and dimensions, ``f32[8,56,56,48]``.
        size: bytes of its numbers.
        padded: bytes it occupies; the last two dimensions are rounded up to whole tiles.
        in_hbm: whether it lies in main memory, not on the chip.
    """

    text: str
    size: int
    padded: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    line: str

    @functools.cached_property
    def result(self) -> tuple[Array, ...]:
        """The arrays that it makes; most instructions lie in fusions, and nobody asks."""
        return arrays(self.type)

    def attribute(self, pattern: str) -> str | None:
        """Return what the first group of a pattern finds in the line."""
        match = re.search(pattern, self.line)
        return match[1] if match else None

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of what it is given."""
        return re.findall(r"%([\w.\-]+)", self.attribute(rf" {re.escape(self.opcode)}\(([^)]*)\)") or "")

    @property
    def calls(self) -> str:
        """The computation that a fusion runs, or ""."""
        return self.attribute(r"\bcalls=%?([\w.\-]+)") or ""

    @property
    def is_kernel(self) -> bool:
        """Whether it calls a Pallas kernel."""
        return 'custom_call_target="tpu_custom_call"' in self.line

    @property
    def op_name(self) -> str:
        """The path of JAX operations that the instruction comes from."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module: its computations by name, the entry's name, and source lines by stack frame."""

    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[int, tuple[str, int, int]]  # file, line, and the calling frame or 0

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction of every computation."""
        return {one.name: one for inside in self.computations.values() for one in inside}

    def origin(self, instruction: Instruction) -> Instruction:
        """Return the instruction, or, where it does not say where it comes from, what made that which it is given."""
        while not instruction.op_name and instruction.operands and instruction.operands[0] in self.by_name:
            instruction = self.by_name[instruction.operands[0]]
        return instruction

    def chain(self, instruction: Instruction) -> list[tuple[str, int]]:
        """Return file and line of every call that led to the instruction, the innermost first; empty where unknown."""
        file, line = instruction.attribute(r'source_file="([^"]*)"'), instruction.attribute(r"source_line=(\d+)")
        if file:
            return [(file, int(line or 0))]
        number = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0)
        found = []
        while number in self.frames:
            file, at, number = self.frames[number]
            found.append((file, at))
        return found

    def source(self, instruction: Instruction) -> str:
        """Return ``file.py:line`` of the innermost call in this project's code, or of the innermost at all."""
        calls = self.chain(instruction)
        ours = [call for call in calls if "/evmamba_jax/" in call[0] or "/pallas_kernels/" in call[0]]
        for file, line in (ours or calls)[:1]:
            return f"{_short(file)}:{line}"
        return ""


def _short(file: str) -> str:
    """Return a path from the package on."""
    for package in ("evmamba_jax", "pallas_kernels", "site-packages"):
        if f"/{package}/" in file:
            tail = file.rpartition(f"/{package}/")[2]
            return tail if package == "site-packages" else f"{package}/{tail}"
    return file.rpartition("/")[2]


def arrays(text: str) -> tuple[Array, ...]:
    """Read every array of a result type such as ``(f32[8,128]{1,0:T(8,128)}, u8[4]{0:T(512)(128)(4,1)S(1)})``."""
    return tuple(_array(match) for match in _ARRAY.finditer(text))


def _array(match: re.Match) -> Array:
    kind, dimensions, order, layout = match.groups()
    width = re.search(r"\d+", kind)  # the first number in f32, bf16, u8, f8e4m3fn
    bits = 8 if kind == "pred" else int(width[0]) if width else 0
    sizes = [int(size) for size in dimensions.split(",") if size]
    padded = sizes
    if order is not None:
        padded = [sizes[int(axis)] for axis in reversed([a for a in order.split(",") if a])]  # the minor-most last
    tile = re.match(r"T\(([\d,]+)\)", layout or "")
    if tile:
        sides = [int(side) for side in tile[1].split(",")]
        padded = [1] * (len(sides) - len(padded)) + padded
        sides = [1] * (len(padded) - len(sides)) + sides
        padded = [-(-size // side) * side for size, side in zip(padded, sides, strict=True)]
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(
        text=f"{kind}[{dimensions}]",
        size=math.prod(sizes) * bits // 8,
        padded=math.prod(padded) * bits // 8,
        in_hbm=space is None,
    )


def parse(text: str) -> Program:
    """Read the text of ``Compiled.as_text()``."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] | None = None
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            if current:
                computations[current].append(_instruction(match[2], line[match.end() :], line))
        elif match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif table is not None and (match := re.match(r"(\d+) (.*)", line)):
            table[int(match[1])] = match[2]
    return Program(computations, entry, _frames(tables))


def _instruction(name: str, rest: str, line: str) -> Instruction:
    opcode = re.search(r" ([a-z][\w\-]*)\(", rest)  # no type has a space and a word before a bracket
    return Instruction(name, opcode[1] if opcode else "", rest[: opcode.start()] if opcode else "", line)


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, int, int]]:
    """Join the tables at the head of a module; frames and their callers are numbered from 1."""

    def number(text: str, key: str) -> int:
        match = re.search(rf"{key}=(\d+)", text)
        return int(match[1]) if match else 0

    files = {key: value.strip('"') for key, value in tables.get("FileNames", {}).items()}
    places = {
        key: (files.get(number(text, "file_name_id"), ""), number(text, r"\bline"))
        for key, text in tables.get("FileLocations", {}).items()
    }
    return {
        # The caller is written one too high, so that 1 stands for none.
        key: (*places.get(number(text, "file_location_id"), ("", 0)), number(text, "parent_frame_id") - 1)
        for key, text in tables.get("StackFrames", {}).items()
    }


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how often a step runs it."""

    instruction: Instruction
    times: int
    computation: str


def runs(program: Program) -> tuple[list[Run], list[str]]:
    """Follow the entry through loops, branches and calls.

    Returns:
        Every instruction outside fusions with the number of its runs in a step, and the names of the loops whose trips
        depend on data; they count as one.
    """
    found: list[Run] = []
    unknown: list[str] = []

    def walk(computation: str, times: int) -> None:
        for instruction in program.computations.get(computation, ()):
            found.append(Run(instruction, times, computation))
            if instruction.opcode == "while":
                count = trips(program, instruction)
                if count is None:
                    unknown.append(instruction.name)
                walk(instruction.attribute(r"body=%?([\w.\-]+)") or "", times * (1 if count is None else count))
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    walk(branch, times)
            elif instruction.opcode in ("call", "async-start"):
                walk(instruction.attribute(r"(?:to_apply|calls|called_computation)=%?([\w.\-]+)") or "", times)

    walk(program.entry, 1)
    return found, unknown


def _branches(instruction: Instruction) -> list[str]:
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return [name.strip().lstrip("%") for name in listed.split(",")]
    both = (instruction.attribute(rf"{side}_computation=%?([\w.\-]+)") for side in ("true", "false"))
    return [name for name in both if name]


def trips(program: Program, loop: Instruction) -> int | None:
    """Return the trips of a while loop: XLA's own count, or the one constant that its counter is compared with."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = program.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", ())
    compares = [i for i in condition if i.opcode in ("compare", "fusion")]
    constants = [i.attribute(r"s32\[\][^ ]* constant\((\d+)\)") for i in condition if i.opcode == "constant"]
    limits = [int(constant) for constant in constants if constant is not None]
    is_counter = len(compares) == 1 and (compares[0].opcode == "fusion" or "direction=LT" in compares[0].line)
    # JAX counts scans and loops of known length from 0 by 1.
    return limits[0] if len(limits) == 1 and is_counter else None


def is_exchange(instruction: Instruction) -> bool:
    """Return whether an instruction is an exchange between devices, or the start or end of one."""
    return instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: all-reduce, all-gather, ...
        size: bytes a device gives or gets, whichever is more.
        group: devices that take part together.
        between_slices: whether a group spans slices.
        times: runs a step.
        op_name, source: where it comes from.
    """

    kind: str
    size: int
    group: int
    between_slices: bool
    times: int
    op_name: str
    source: str

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one run, around a ring."""
        if self.kind == "collective-permute":
            return self.size
        return self.size * (2 if self.kind == "all-reduce" else 1) * (self.group - 1) / max(1, self.group)


def collectives(program: Program, found: list[Run], *, devices: int, slices: int = 1) -> Iterator[Collective]:
    """Yield every exchange of a step, those inside of fusions included."""
    for run in found:
        instruction = run.instruction
        # Between slices the hosts exchange what they are sent: a share of it for each device of a slice.
        transfer = instruction.opcode == "send" and instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if transfer:
            size = sum(array.size for array in instruction.result if array.size > 8)
            kind = transfer.lower().replace("_", "-")
            yield Collective(kind, size, slices, True, run.times, instruction.op_name, program.source(instruction))
        inner = [instruction]
        if instruction.opcode == "fusion":
            inner = program.computations.get(instruction.calls, [])
        for one in inner:
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            operands = _operand_arrays(program, one, inner, run.computation)
            results = [array.size for array in one.result if array.size > 8]  # the rest are semaphores
            # A start's result holds operand and result of a gather or a permutation.
            size = (
                sum(results) if kind == "all-reduce" or not one.opcode.endswith("-start") else max(results, default=0)
            )
            group = _group(one, devices)
            per_slice = devices // slices
            yield Collective(
                kind=kind,
                size=max(size, operands),
                group=len(group),
                between_slices=len({device // per_slice for device in group}) > 1,
                times=run.times,
                op_name=one.op_name or instruction.op_name,
                source=program.source(one) or program.source(instruction),
            )


def _operand_arrays(program: Program, one: Instruction, inner: list[Instruction], computation: str) -> int:
    """Return the bytes of the arguments of a reduce-scatter, whose result is but a share."""
    if not one.opcode.startswith("reduce-scatter"):
        return 0
    known = {i.name: i for i in (*program.computations.get(computation, ()), *inner)}
    return sum(array.size for name in one.operands if name in known for array in known[name].result)


def _group(instruction: Instruction, devices: int) -> list[int]:
    """Return the devices of the first group of an exchange; of a permutation, the most distant pair."""
    line = instruction.line
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    if pairs:
        each = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return list(max(each, key=lambda pair: abs(pair[0] - pair[1]), default=(0, 0)))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(device) for device in match[1].split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape([int(size) for size in match[3].split(",")])
        if match[4]:
            ids = ids.transpose([int(axis) for axis in match[4].split(",")])
        return ids.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}", line):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        ids = np.arange(devices).reshape([int(size) for size in axes.values()])
        used = re.findall(r"'([^']+)'", match[2])
        return ids[tuple(slice(None) if axis in used else 0 for axis in axes)].ravel().tolist()
    return list(range(devices))


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Arrays of one shape that one place of the program makes in main memory."""

    array: Array
    count: int
    op_name: str
    source: str


def buffers(program: Program, found: list[Run]) -> list[Buffer]:
    """Return the arrays that the step makes in main memory, the largest first; they need not live at the same time."""
    counted: dict[tuple[Array, str, str], int] = {}
    for run in found:
        instruction = run.instruction
        reused = "output_to_operand_aliasing" in instruction.line
        if instruction.opcode in _ALIASES or reused or 'custom_call_target="AllocateBuffer"' in instruction.line:
            continue
        for array in instruction.result:
            if array.in_hbm and array.padded >= 2**16:
                key = array, instruction.op_name, program.source(instruction)
                counted[key] = counted.get(key, 0) + 1
    each = [Buffer(array, count, op_name, source) for (array, op_name, source), count in counted.items()]
    return sorted(each, key=lambda buffer: -buffer.array.padded)


def arguments(program: Program) -> dict[str, Array]:
    """Return the step's arguments by the name JAX gives them, ``state['model']['params']['head.kernel']``."""
    entry = [i for i in program.computations[program.entry] if i.opcode == "parameter"]
    return {i.op_name.replace("\\'", "'"): i.result[0] for i in entry}


def pallas_calls(found: list[Run]) -> list[tuple[str, list[str], int]]:
    """Return name, types of the results and runs in a step of each call of a Pallas kernel."""
    return [
        (run.instruction.name, [array.text for array in run.instruction.result], run.times)
        for run in found
        if run.instruction.is_kernel
    ]
