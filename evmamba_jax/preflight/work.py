"""What a training step has to do, counted from its traced program: operations of each unit of a TPU, and bytes.

**Which operations.** Multiply-adds of the matrix unit: matrix products and convolutions, gradients included.
``Precision.HIGH`` and ``HIGHEST`` take three and six passes. Zeros that a convolution inserts are not counted. A
depthwise convolution is the vector units' work: a multiplication and an addition for each element of its kernel. All
else takes ``VECTOR`` and ``EXPONENTIAL`` operations for each element. Moves, broadcasts and conversions of types are
free, and so is what would be computed a second time.

**Which bytes.** The step has three phases: forward (with the augmentation), backward, and update (whatever uses a
gradient). A phase has *stages*: a new one begins where a kernel has run, or where a sum over all images (axis 0) is
used, as in BatchNorm and in the norm of the gradient. Each operation stands in the first stage that can have it. Within
a stage all is fused: what is made and used there never leaves the chip, sums within an image (LayerNorm,
squeeze-and-excitation, attention) included. What a stage needs of earlier ones must be *kept*: written once, and read
once by each stage that needs it.

Kept is the cheapest set of arrays from which all that the stage needs follows by operations on single elements: a
LayerNorm's output follows from its input and two sums, an activation from what it is applied to. The result of a matrix
product, convolution, sum, sort, draw of random numbers or kernel does not follow. The set is a minimum cut of the
program's graph, chosen for one stage after another; an array weighs its bytes to be read, and as many if it must first
be written. (PyTorch's compiler chooses activations so, ``min_cut_rematerialization_partition``.)

The step's arguments (parameters, optimizer state, moving average, batch) are in memory: each stage that uses one reads
it. The step's results are written once. So a gradient is written by the backward phase and read by the update. A
kernel's arguments and results pass through memory: what makes an argument writes it, what uses a result reads it. No
array stays in the chip's own memory from one stage to the next, though a compiler may leave small ones there.
"""

import collections
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from evmamba_jax.counting.program import inner_programs
from evmamba_jax.preflight.kernels import Scan
from evmamba_jax.preflight.parts import PARTS, part_of
from evmamba_jax.tasks import task_of
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup
from pallas_kernels import Order

# Operations of the vector units for each element of the result; 1 for what is neither here nor free.
VECTOR = {
    "logistic": 2,  # scale the exponent, add 1
    "tanh": 0,
    "rsqrt": 0,
    "exp2": 0,
    "log1p": 2,
    "expm1": 2,
    "erf": 11,  # 2 sigmoid(x p(x^2)) - 1, p of degree 3, its argument clipped
    "erfc": 11,
    "erf_inv": 20,  # a logarithm, and one of two polynomials of degree 8
    "sin": 20,
    "cos": 20,
    "pow": 1,
    "random_bits": 116,  # Threefry: 20 rounds of an addition, a rotation of three and an exclusive or; 5 keys
}
# Operations of the exponential unit: powers, logarithms, reciprocals and reciprocal roots.
EXPONENTIAL = {
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log1p", "tanh", "rsqrt", "sqrt", "erf_inv"), 1),
    **dict.fromkeys(("logistic", "erf", "erfc", "pow"), 2),
}
# What moves or names numbers, or costs nothing for each element.
_FREE = {
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "pad", "concatenate", "copy"),
    "rev",
    *("split", "stack", "unstack", "name", "reshard", "stop_gradient", "convert_element_type", "bitcast_convert_type"),
    *("empty", "empty2", "iota", "platform_index", "pvary", "sharding_constraint", "optimization_barrier"),
    *("random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split"),
    *("dynamic_slice", "dynamic_update_slice", "gather"),
}
# What does not follow cheaply from its arguments. Loops and kernels do not either.
_COSTLY = {
    *("dot_general", "conv_general_dilated", "ragged_dot", "fft", "random_bits", "random_gamma", "sort", "top_k"),
    *("gather", "scatter", "scatter-add", "scatter_add", "reduce_window", "reduce_window_sum", "reduce_window_max"),
    *("select_and_scatter_add", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "random_split"),
    *("random_fold_in", "random_seed", "argmax", "argmin", "psum", "all_gather"),
}
_LOOPS = ("scan", "while")
_PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}


class Call(NamedTuple):
    """A pass of a scan: ``forward`` or ``backward``, the bytes of one of its image's numbers, and how often it runs."""

    scan: Scan
    direction: str
    itemsize: int
    times: int


@dataclasses.dataclass
class Work:
    """What a part of a step has to do, whatever the device.

    Attributes:
        macs: multiply-adds of the matrix unit, in passes of bfloat16.
        bytes: to and from main memory.
        vector: operations of the vector units.
        exponential: operations of the exponential unit.
        scans: calls of scans.
    """

    macs: float = 0.0
    bytes: float = 0.0
    vector: float = 0.0
    exponential: float = 0.0
    scans: list[Call] = dataclasses.field(default_factory=list)

    def add(self, other: "Work", times: float) -> None:
        """Add what another part has to do, so many times."""
        self.macs += times * other.macs
        self.bytes += times * other.bytes
        self.vector += times * other.vector
        self.exponential += times * other.exponential
        self.scans += [call._replace(times=call.times * round(times)) for call in other.scans]


def step_work(config: Any, *, devices: int) -> dict[str, Work]:
    """Return what each part of a configuration's training step has to do on one of some devices.

    Each has its share of the images and, as ``config.mesh.fsdp`` says, of the update. Nothing is allocated.

    Args:
        config: as a training takes it; how it rematerialises and which scans it takes make no difference.
        devices: of the whole mesh.
    """
    config = copy.deepcopy(config)
    share, config.mesh.fsdp = 1 / config.mesh.fsdp, 1
    config.batch_size //= devices
    config.model.remat = "none"
    config.model.options = {name: value for name, value in config.model.options.items() if name != "implementation"}
    kind = task_of(config)
    class_names, examples, _ = kind.describe(config)
    setup = Setup(kind(config, class_names), make_mesh(config, jax.devices("cpu")[:1]), examples)
    step, arguments = setup.step()
    with jax.set_mesh(setup.mesh):
        return count(jax.jit(step).trace(*arguments).jaxpr, update_share=share)


def count(program: ClosedJaxpr, *, update_share: float = 1.0) -> dict[str, Work]:
    """Return what each part of a traced step of one device has to do; parts with nothing to do are left out.

    Differentiation must have been part of what was traced, without rematerialisation, which a floor knows nothing of.

    Args:
        program: the step, ``jax.make_jaxpr(step)(...)``.
        update_share: of the update, which devices may divide.
    """
    return _count(program.jaxpr, backward=False, update_share=update_share)


FORWARD, BACKWARD, UPDATE = range(3)


@dataclasses.dataclass
class _Value:
    """An array of the program: its bytes, and whether it lies in main memory anyway."""

    bytes: int
    maker: "_Operation | None" = None
    in_memory: bool = False


@dataclasses.dataclass(eq=False)
class _Operation:
    """An equation, outside of functions and branches."""

    equation: JaxprEqn
    part: str
    phase: int
    reads: list[_Value]
    writes: list[_Value]
    stage: int = 0

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def is_kernel(self) -> bool:
        return _direction(self.name) is not None or self.name in (*_LOOPS, "pallas_call")

    @property
    def ends_stage(self) -> bool:
        """Whether nothing that uses the result can be fused with it: a kernel, or a sum over axis 0, of all images."""
        return self.is_kernel or (self.is_sum and 0 in self.equation.params["axes"])

    @property
    def is_sum(self) -> bool:
        """Whether it is a reduction along axes."""
        return self.name.startswith("reduce_") and "axes" in self.equation.params

    @property
    def is_cheap(self) -> bool:
        return not (self.is_kernel or self.is_sum or self.name in _COSTLY)


def _direction(name: str) -> str | None:
    """Return which pass of a scan an operation is (pallas_kernels/dispatch.py)."""
    scan, _, direction = name.rpartition("_")
    return direction if scan in ("scan2d", "selective_scan") else None


def _count(program: Jaxpr, *, backward: bool, update_share: float) -> dict[str, Work]:
    arguments = {var: _Value(_bytes(var), in_memory=True) for var in program.invars}
    operations: list[_Operation] = []
    values = dict(arguments)
    _flatten(program, values, operations, None, backward)
    results = [values[var] for var in program.outvars if not isinstance(var, Literal) and var in values]
    operations = _living(operations, results)

    _set_stages(operations)

    work: dict[str, Work] = collections.defaultdict(Work)
    shares = {FORWARD: 1.0, BACKWARD: 1.0, UPDATE: update_share}
    for operation in operations:
        if operation.name in _LOOPS:
            for part, inside in _inside(operation).items():
                work[part].add(inside, shares[operation.phase])
        else:
            work[operation.part].add(_arithmetic(operation), shares[operation.phase])
    for part, moved, phase in _moved(operations, results):
        work[part].bytes += moved * shares[phase]
    return {part: work[part] for part in PARTS if part in work}


def _bytes(var: Any) -> int:
    aval = var.aval
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", ())) * itemsize


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _flatten(
    program: Jaxpr, values: dict[Any, _Value], operations: list[_Operation], part: str | None, backward: bool
) -> None:
    """Append the operations of a program and of the functions that it calls; ``values`` holds its arguments.

    Args:
        program: the program.
        values: by variable; constants are not among them.
        operations: what came before.
        part: of the call that the program is in. JAX traces a function once for all its calls, so that its own
            equations know only where it was first called.
        backward: whether that call is part of the backward phase.
    """
    for equation in program.eqns:
        # A part is asked for where it matters: the chain of a call takes time to read.
        own = part or part_of(_frames(equation))
        back = backward or "transpose(" in str(equation.source_info.name_stack)
        inner = None if equation.primitive.name in (*_LOOPS, "pallas_call") else _called(equation)
        if inner is not None:
            given = equation.invars[len(equation.invars) - len(inner.invars) :]
            known = {}
            for parameter, var in zip(inner.invars, given, strict=True):
                if not isinstance(var, Literal) and var in values:
                    known[parameter] = values[var]
            is_branch = equation.primitive.name == "cond"  # traced where it stands
            _flatten(inner, known, operations, part if is_branch or own == "other" else own, back)
            for var, made in zip(equation.outvars, inner.outvars, strict=True):
                if not isinstance(made, Literal) and made in known:
                    values[var] = known[made]
            continue
        reads = [values[var] for var in equation.invars if not isinstance(var, Literal) and var in values]
        back = back or _direction(equation.primitive.name) == "backward"
        uses_gradient = any(value.maker is not None and value.maker.phase > FORWARD for value in reads)
        phase = BACKWARD if back else UPDATE if uses_gradient else FORWARD
        operation = _Operation(equation, own, phase, reads, [])
        operation.writes = [_Value(_bytes(var), operation, operation.is_kernel) for var in equation.outvars]
        values.update(zip(equation.outvars, operation.writes, strict=True))
        operations.append(operation)


def _frames(equation: JaxprEqn) -> Iterable[tuple[str, int]]:
    """Return file and line of every call that led to an equation, the innermost first."""
    traceback = equation.source_info.traceback
    return [] if traceback is None else ((frame.file_name, frame.line_num) for frame in traceback.frames)


def _called(equation: JaxprEqn) -> Jaxpr | None:
    """Return the program that an equation only calls; of branches, that for a TPU, or the longest."""
    programs = inner_programs(equation)
    if equation.primitive.name == "cond":
        platforms = equation.params.get("branches_platforms")
        if platforms is not None:
            ours = [number for number, names in enumerate(platforms) if names is not None and "tpu" in names]
            return programs[ours[0] if ours else platforms.index(None)]
        return max(programs, key=_length)
    # Reductions and scatters hold what they combine with, a program of single numbers.
    is_call = equation.primitive.name in _CALLS
    return programs[0] if is_call and programs else None


_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("checkpoint", "remat", "remat2", "shard_map", "custom_lin"),
}


def _length(program: Jaxpr) -> int:
    return len(program.eqns) + sum(_length(inner) for equation in program.eqns for inner in inner_programs(equation))


def _living(operations: list[_Operation], results: list[_Value]) -> list[_Operation]:
    """Return the operations that the results depend on."""
    wanted = {id(value) for value in results}
    living = []
    for operation in reversed(operations):
        if any(id(value) in wanted for value in operation.writes):
            living.append(operation)
            wanted.update(id(value) for value in operation.reads)
    return living[::-1]


def _set_stages(operations: list[_Operation]) -> None:
    """Number the stages; all stages of a phase come after the phase before."""
    first = 0
    for phase in (FORWARD, BACKWARD, UPDATE):
        last = first
        for operation in operations:
            if operation.phase == phase:
                makers = [value.maker for value in operation.reads if value.maker is not None]
                operation.stage = max([first, *(maker.stage + maker.ends_stage for maker in makers)])
                last = max(last, operation.stage)
        first = last + 1


def _inside(loop: _Operation) -> dict[str, Work]:
    """Return what the trips of a loop do; a loop of unknown length counts as one trip."""
    equation = loop.equation
    body = equation.params["jaxpr" if loop.name == "scan" else "body_jaxpr"].jaxpr
    trips = equation.params.get("length", 1)
    total: dict[str, Work] = collections.defaultdict(Work)
    for part, inside in _count(body, backward=loop.phase == BACKWARD, update_share=1.0).items():
        total[loop.part if part == "other" else part].add(inside, trips)
    return total


def _arithmetic(operation: _Operation) -> Work:
    """Return what an operation has to do, without its bytes."""
    equation, name = operation.equation, operation.name
    if direction := _direction(name):
        return Work(scans=[_scan(equation, direction)])
    if name == "dot_general":
        return Work(macs=_product(equation))
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name in _FREE or name == "pallas_call" or not equation.outvars:
        return Work()
    size = _size(equation.outvars[0])
    transcendental, vector = EXPONENTIAL.get(name, 0), VECTOR.get(name, 1)
    if operation.is_sum or name.startswith(("arg", "cum", "sort", "top_k")):
        return Work(vector=_size(equation.invars[0]))
    if name == "div" and _size(equation.invars[1]) > 1 and not _is_integer(equation):
        transcendental = 1  # a reciprocal
    if name == "integer_pow":
        power = equation.params["y"]
        transcendental = int(power < 0)
        vector = abs(power).bit_length() - 1 + abs(power).bit_count() - 1
    return Work(vector=vector * size, exponential=transcendental * size)


def _is_integer(equation: JaxprEqn) -> bool:
    return np.issubdtype(equation.outvars[0].aval.dtype, np.integer)  # pyrefly: ignore


def _product(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape  # pyrefly: ignore
    macs = _size(equation.outvars[0]) * math.prod(shape[axis] for axis in contracted)
    return macs * _passes(equation)


def _passes(equation: JaxprEqn) -> int:
    precision = equation.params.get("precision")
    each: Any = precision if isinstance(precision, tuple) else (precision,)
    return max(_PASSES.get(one, 1) for one in each)


def _convolution(equation: JaxprEqn) -> Work:
    image, kernel = (var.aval.shape for var in equation.invars)  # pyrefly: ignore
    params = equation.params
    numbers = params["dimension_numbers"]
    result = _size(equation.outvars[0])
    for_each = math.prod(kernel) // kernel[numbers.rhs_spec[0]] / math.prod(params["lhs_dilation"])
    batch, feature = (image[axis] for axis in numbers.lhs_spec[:2])
    groups = params["feature_group_count"], params["batch_group_count"]
    if (groups[0] > 1 and groups[0] == feature) or (groups[1] > 1 and groups[1] == batch):
        return Work(vector=result * max(1, 2 * for_each - 1))
    return Work(macs=result * for_each * _passes(equation))


def _scan(equation: JaxprEqn, direction: str) -> Call:
    """Return the scan of an equation of either pass; ``selective_scan`` as one of images of a single row.

    Its groups are images apart. Its steps come in full size, as if their rank were the channels.
    """
    avals: list[Any] = [var.aval for var in equation.invars]
    if equation.primitive.name.startswith("selective_scan"):
        u, _, A, *_ = avals
        batch, length, groups, width = u.shape
        scan = Scan(batch * groups, 1, length, width, rank=width, state=A.shape[1], orders=(Order(),))
        return Call(scan, direction, u.dtype.itemsize, 1)
    x, _, dt_weight, _, A, *_ = avals
    orders = dict(equation.params["how"][1])["orders"]
    return Call(
        Scan(*x.shape, rank=dt_weight.shape[1], state=A.shape[2], orders=orders), direction, x.dtype.itemsize, 1
    )


def _moved(operations: list[_Operation], results: list[_Value]) -> Iterator[tuple[str, int, int]]:
    """Yield bytes that must be read or written, each with the part and the phase that do it."""
    written: set[int] = set()  # what lies in memory because something wrote it

    def write(value: _Value) -> Iterator[tuple[str, int, int]]:
        if value.maker is not None and not value.in_memory and id(value) not in written:
            written.add(id(value))
            yield value.maker.part, value.bytes, value.maker.phase

    for operation in operations:
        if operation.is_kernel:
            for value in operation.reads:
                yield from write(value)
    for value in results:
        yield from write(value)
    stages: dict[int, list[_Operation]] = collections.defaultdict(list)
    for operation in operations:
        if not operation.is_kernel:
            stages[operation.stage].append(operation)
    for stage, users in sorted(stages.items()):
        needed: dict[int, tuple[_Value, str]] = {}
        for user in users:
            for value in user.reads:
                if value.maker is None or value.maker.stage < stage:
                    needed.setdefault(id(value), (value, user.part))
        for value, reader in _kept(list(needed.values()), written):
            yield from write(value)
            yield reader, value.bytes, users[0].phase


def _kept(needed: list[tuple[_Value, str]], written: set[int]) -> list[tuple[_Value, str]]:
    """Return the arrays that cost least, and from which all that is needed follows; each with the part that reads it.

    A minimum cut between what does not follow cheaply and what is needed; an array is an edge, which weighs its bytes
    to be read, and once more if it must be written for this.
    """
    order: dict[int, int] = {}
    values: list[_Value] = []
    readers: list[str] = []
    links: list[tuple[int, int]] = []  # from an array to one that follows from it
    stack = list(needed)
    while stack:
        value, reader = stack.pop()
        if id(value) in order:
            continue
        order[id(value)] = len(values)
        values.append(value)
        readers.append(reader)
        if value.maker is not None and value.maker.is_cheap:
            stack += [(source, reader) for source in value.maker.reads]
    if not values:
        return []
    sources = []
    for number, value in enumerate(values):
        if value.maker is None or not value.maker.is_cheap:
            sources.append(number)
        else:
            links += [(order[id(source)], number) for source in value.maker.reads]
    costs = [v.bytes * (1 if v.in_memory or id(v) in written else 2) for v in values]
    cut = minimum_cut(costs, sources, [order[id(value)] for value, _ in needed], links)
    return [(values[number], readers[number]) for number in cut]


def minimum_cut(costs: list[int], sources: list[int], needed: list[int], links: list[tuple[int, int]]) -> list[int]:
    """Return the nodes of least cost without which no path leads from a source to a needed node."""
    unit = max(1, sum(costs) // 2**30)  # SciPy's flows are 32 bits wide
    endless, count = 2**31 - 1, len(costs)
    start, end = 2 * count, 2 * count + 1
    edges = {(2 * node, 2 * node + 1): -(-cost // unit) for node, cost in enumerate(costs)}
    edges |= {(2 * a + 1, 2 * b): endless for a, b in links}
    edges |= {(start, 2 * node): endless for node in sources} | {(2 * node + 1, end): endless for node in needed}
    rows, columns = zip(*edges, strict=True)
    shape = (2 * count + 2,) * 2
    capacities = sparse.csr_matrix((np.array(list(edges.values()), np.int32), (rows, columns)), shape=shape)
    left = capacities - maximum_flow(capacities, start, end).flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = np.zeros(2 * count + 2, bool)
    reached[breadth_first_order(left, start, return_predecessors=False)] = True
    return [node for node in range(count) if reached[2 * node] and not reached[2 * node + 1]]
