"""How long a compiled TPU program takes: the sum over its instructions of the compiler's schedule or of their traffic.

An instruction takes as long as its schedule says (``schedules.py``: static cycles, without waiting for memory) or as
its bytes to and from main memory need, whichever is longer. Nothing runs; what the figures were compared with is in
``benchmarks/results/tpu_clock.md``.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator

from evmamba_jax.preflight import hlo, schedules
from evmamba_jax.preflight.aot import GENERATIONS, Generation
from evmamba_jax.preflight.hlo import Instruction, Program, Run
from evmamba_jax.preflight.parts import instruction_parts
from evmamba_jax.preflight.schedules import Schedule

ATTAINABLE = 0.8  # of the peak of the main memory's bandwidth

# What benchmarks/results/tpu_clock.md comes to; reports and documentation repeat it.
UNCERTAINTY = (
    "Schedules of large matrix products come within 4 % of times measured on a v5e; no other schedule could be "
    "compared with a chip. Memory at 70 or 90 % of its peak instead of 80 % changes what waits for it by 11 to 14 %. "
    "By judgement the time is known to about 15 %, good for comparing programs rather than for a budget."
)

KINDS = ("matrix products", "depthwise", "reductions", "elementwise", "kernels", "copies", "transfers", "others")
GROUPS = 8  # a convolution of so many groups or more is depthwise
# What only moves numbers about.
_MOVES = {
    *("parameter", "copy", "transpose", "bitcast", "reshape", "broadcast", "constant", "pad", "slice", "concatenate"),
    *("dynamic-slice", "dynamic-update-slice", "tuple", "get-tuple-element", "reverse"),
}
_OTHERS = {"sort", "scatter", "gather", "rng-bit-generator", "custom-call", "select-and-scatter"}
# What takes no time: names for others' results, control, and what the instructions within take.
_FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all"),
    *("optimization-barrier", "partition-id", "replica-id", "add-dependency", "async-start", "async-update"),
    *("async-done", "send", "send-done", "recv", "recv-done"),
}
# What says where an instruction comes from and what it waits for, not what it does.
_ELSEWHERE = re.compile(
    r', metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}|, (?:control-predecessors|sharding|frontend_attributes)=\{[^}]*\}'
)
_STARTS, _DONES = ("copy-start", "slice-start"), ("copy-done", "slice-done")


@dataclasses.dataclass(frozen=True)
class Timed:
    """What one instruction of a program takes: estimates.

    Attributes:
        name: the instruction's.
        kind: one of ``KINDS``.
        runs: in a step; all else is of all of them together.
        seconds: the longer of ``schedule`` and ``memory``; of a transfer between memories, which goes on beside other
            instructions, what they have left of it when its result is needed, or all where its start is not found.
        schedule: seconds by the compiler's schedule; None where it wrote none.
        bytes: moved to and from main memory.
        memory: seconds that these bytes need.
        is_complete: whether the trips of all loops in the schedule are known; else it says the least.
        unit, load: the unit that the loop with most cycles keeps busiest, and the share of its slots in use.
        vmem: bytes of the chip's own memory that its schedule takes.
        spills: registers written to memory in one run of each loop.
        direction: ``backward`` for what differentiation made, else ``forward``.
        source: ``file.py:line``; of a transfer or copy that says none, of what it copies.
        op_name: the path of JAX operations, in the same way.
        part: of the step, one of :data:`evmamba_jax.preflight.parts.PARTS`.
    """

    name: str
    kind: str
    runs: int
    seconds: float
    schedule: float | None
    bytes: int
    memory: float
    is_complete: bool
    unit: str
    load: float
    vmem: int
    spills: int
    direction: str
    source: str
    op_name: str
    part: str


def bandwidth(generation: Generation) -> float:
    """Return the bytes/s that one JAX device can be expected to move to and from its main memory."""
    return ATTAINABLE * generation.hbm_bandwidth / generation.devices_per_chip


def clock(program: Program, dump_folder: str | os.PathLike[str], generation: str) -> list[Timed]:
    """Time every instruction of the last program that was compiled after ``aot.prepare(dump_folder)``.

    Transfers between the main memory and the chip's own run beside other instructions, in the order in which they
    start, and progress while these leave the main memory idle. Loops count with their trips. A loop of unknown trips
    (:func:`evmamba_jax.preflight.hlo.runs` names it) counts once; each branch of a condition counts. Exchanges between
    devices are left out.

    Args:
        program: the compiled program.
        dump_folder: the folder.
        generation: what it was compiled for.

    Returns:
        An item for each instruction that takes time, in the program's order.

    Raises:
        ValueError: a schedule in a format that the reader does not know.
    """
    rate, traffic = bandwidth(GENERATIONS[generation]), _Traffic(program)
    scheduled = _Schedules(program, dump_folder, generation)
    moving: dict[str, tuple[Run, float]] = {}  # transfers on their way, the first to start first, and seconds left
    items: list[Timed] = []
    parts = instruction_parts(program)

    def add(run: Run, kind: str, moved: int, schedule: Schedule | None, waiting: float = 0.0) -> Timed:
        one, memory = run.instruction, moved * run.times / rate
        computing = None if schedule is None else schedule.seconds * run.times
        loops, origin = schedule.loops if schedule else (), program.origin(one)
        unit, load = max(loops, key=lambda loop: loop.cycles).busiest if loops else ("", 0.0)
        items.append(
            Timed(
                name=one.name,
                kind=kind,
                runs=run.times,
                seconds=waiting if one.opcode in _STARTS else max(memory, computing or 0.0),
                schedule=computing,
                bytes=moved * run.times,
                memory=memory,
                is_complete=schedule is None or schedule.is_complete,
                unit=unit,
                load=load,
                vmem=schedule.vmem_bytes if schedule else 0,
                spills=sum(loop.spills for loop in loops),
                direction="backward" if "transpose(" in origin.op_name else "forward",
                source=program.source(origin),
                op_name=origin.op_name,
                part=parts[one.name],
            )
        )
        return items[-1]

    def progress(seconds: float) -> None:
        for name, (start, left) in moving.items():
            moving[name] = start, max(0.0, left - seconds)
            seconds = max(0.0, seconds - left)

    for run in hlo.runs(program)[0]:
        one = run.instruction
        if one.opcode in _STARTS:
            moving[one.name] = run, traffic.copied(one) * run.times / rate
        elif one.opcode in _DONES:
            # A start in another trip or computation: nothing is known of what hides the transfer.
            start, waiting = moving.pop(one.operands[0], (run, 0.0))
            add(start, "transfers", traffic.copied(start.instruction), None, waiting)
        elif one.opcode not in _FREE and not hlo.is_exchange(one):
            moved, schedule = traffic.of(one), scheduled.of(one)
            if moved or schedule:  # else it is about a number
                timed = add(run, _kind(program, one), moved, schedule)
                progress(timed.seconds - timed.memory)
    return items


class _Schedules:
    """Finds and reads the schedules of instructions; of equal ones the compiler writes the first one's alone."""

    def __init__(self, program: Program, dump_folder: str | os.PathLike[str], generation: str):
        self._program, self._generation = program, generation
        self._files = schedules.files(dump_folder, of_last_program=True)
        self._texts: dict[str, int] = {}  # computations in a form without names, numbered
        self._numbers: dict[str, int] = {}  # of computations
        self._read: dict[str, Schedule] = {}

    def of(self, one: Instruction) -> Schedule | None:
        """Return the schedule of an instruction, or None where the compiler wrote none."""
        name = one.name if one.name in self._files else self._equals.get(self._form(one))
        if name is None:
            return None
        if name not in self._read:
            schedule = schedules.read_files(name, self._files[name], self._generation)
            # What guards the loops of our kernels is known.
            trips = schedules.guarded(schedule) if one.is_kernel else {}
            if trips:
                schedule = schedules.read_files(name, self._files[name], self._generation, trips=trips)
            self._read[name] = schedule
        return self._read[name]

    @functools.cached_property
    def _equals(self) -> dict[str, str]:
        """The names of instructions that have a schedule, by their forms."""
        every = self._program.by_name.values()
        return {self._form(one): one.name for one in every if one.name in self._files}

    def _form(self, one: Instruction, places: dict[str, int] | None = None) -> str:
        """Return an instruction's text, where another's name is replaced by its type, or by its place if that is given.

        Computations that it calls are replaced by their numbers, equal ones by the same.
        """

        def replaced(match: re.Match) -> str:
            name = match[1]
            if places is not None and name in places:
                return f"%{places[name]}"
            if name in self._program.computations:
                return f"calls {self._number(name)}"
            return f"%{self._program.by_name[name].type if name in self._program.by_name else name}"

        return re.sub(r"%([\w.\-]+)", replaced, _ELSEWHERE.sub("", one.line.partition(" = ")[2]))

    def _number(self, computation: str) -> int:
        if computation not in self._numbers:
            inside = self._program.computations[computation]
            places = {one.name: place for place, one in enumerate(inside)}
            text = "\n".join(self._form(one, places) for one in inside)
            self._numbers[computation] = self._texts.setdefault(text, len(self._texts))
        return self._numbers[computation]


def _kind(program: Program, one: Instruction) -> str:
    """Return which of ``KINDS`` an instruction is."""
    if one.is_kernel:
        return "kernels"
    within = list(_within(program, one))
    opcodes = {each.opcode for each in within}
    if opcodes & {"convolution", "dot"}:
        groups = [int(each.attribute(r"(?:feature|batch)_group_count=(\d+)") or 1) for each in within]
        return "depthwise" if max(groups) >= GROUPS else "matrix products"
    if opcodes & _OTHERS:
        return "others"
    if opcodes & {"reduce", "reduce-window"}:
        return "reductions"
    return "copies" if opcodes <= _MOVES else "elementwise"


def _within(program: Program, one: Instruction) -> Iterator[Instruction]:
    """Yield an instruction, or the instructions of a fusion."""
    if one.opcode != "fusion":
        yield one
        return
    for inner in program.computations.get(one.calls, ()):
        yield from _within(program, inner)


class _Traffic:
    """Counts the bytes that instructions move to and from main memory, as the arrays lie there, padding included.

    What is given or made counts once. Where only a slice of an array is read or replaced, the slice counts.
    """

    def __init__(self, program: Program):
        self._program = program

    def copied(self, start: Instruction) -> int:
        """Return the bytes of a copy that runs beside others: once for each side that is main memory.

        Of a copy's end alone, which tells one side, once.
        """
        if start.opcode in _DONES:
            return start.result[0].padded
        both = start.result[:2]  # where it goes and where it comes from; of a slice the whole, and then the slice
        return min(array.padded for array in both) * sum(array.in_hbm for array in both)

    def of(self, one: Instruction) -> int:
        """Return the bytes that one run of an instruction moves."""
        moved = 0
        for number, name in enumerate(one.operands):
            given = self._program.by_name.get(name)
            whole = sum(array.padded for array in given.result if array.in_hbm) if given else 0
            if whole:
                moved += min(whole, self._read(one, number, whole))
        return moved + self._written(one)

    def _read(self, one: Instruction, number: int, whole: int) -> int:
        """Return the bytes of its given array of a number that an instruction reads."""
        if one.opcode == "fusion":
            moved, is_made = self._used(one, number, whole)
            return whole if is_made else moved
        if number == 0 and one.opcode in ("dynamic-slice", "slice", "gather"):
            return sum(array.padded for array in one.result)
        return 0 if number == 0 and one.opcode == "dynamic-update-slice" else whole

    def _used(self, fusion: Instruction, number: int, whole: int) -> tuple[int, bool]:
        """Return the bytes that a fusion reads of what it is given, and whether it makes the very array of it."""
        inside = self._program.computations.get(fusion.calls, [])
        names = [one.name for one in inside if one.opcode == "parameter" and f" parameter({number})" in one.line]
        moved, is_made = 0, False
        while names:
            name = names.pop()
            is_made |= name == inside[-1].name
            for user, place in self._users.get(name, ()):
                if user.opcode == "bitcast":
                    names.append(user.name)
                elif user.opcode == "fusion":
                    within, is_passed = self._used(user, place, whole)
                    moved += within
                    names += [user.name] * is_passed
                else:
                    moved += self._read(user, place, whole)
        return moved, is_made

    @functools.cached_property
    def _users(self) -> dict[str, list[tuple[Instruction, int]]]:
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for one in self._program.by_name.values():
            for number, name in enumerate(one.operands):
                users.setdefault(name, []).append((one, number))
        return users

    def _written(self, one: Instruction) -> int:
        """Return the bytes that one run of an instruction writes."""
        if 'custom_call_target="AllocateBuffer"' in one.line:
            return 0
        makers = [one] * len(one.result)
        if one.opcode == "fusion":
            inside = self._program.computations.get(one.calls, [])
            root = inside[-1] if inside else one
            each = root.operands if root.opcode == "tuple" else [root.name] * len(makers)
            makers = [self._program.by_name[name] for name in each]
        moved = 0
        for array, maker in zip(one.result, makers, strict=True):
            while maker.opcode == "bitcast":
                maker = self._program.by_name[maker.operands[0]]
            if not array.in_hbm:
                continue
            replaced = self._program.by_name[maker.operands[1]] if maker.opcode == "dynamic-update-slice" else None
            moved += sum(part.padded for part in replaced.result) if replaced else array.padded
        return moved
