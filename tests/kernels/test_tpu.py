"""The TPU kernels in Pallas's interpreters against loops in float64, and their plans against brute force."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle
from interpreted import one_token_a_turn
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place that says whether there were races
from jax.experimental.pallas import tpu as pltpu
from test_selective_scan import ALL, close

from pallas_kernels import ATROUS, CROSS, Chain, Order, tpu
from pallas_kernels.tpu import images, sequences, tuning
from pallas_kernels.tpu.chip import Chip
from pallas_kernels.tpu.geometry import Segment, for_tokens, grids
from pallas_kernels.tpu.problem import Problem

# The kernel as XLA operations: no check of memory, but another token costs next to nothing.
PLAIN = True
# Memory that nobody wrote reads as NaN, and reading beyond a block raises; every access is a call into Python.
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
# Two cores share the axes of the grid that the kernels call parallel.
RACES = dataclasses.replace(STRICT, detect_races=True, num_cores_or_threads=2)

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


# Of both kinds of cases, ``two_stores`` is of the chip, and ``short`` asks for kernels that compile faster.


@dataclasses.dataclass(frozen=True)
class Images:
    """A call of ``scan2d``."""

    orders: tuple[Order | Chain, ...]
    grid: tuple[int, int]
    channels: int
    state: int
    rank: int
    batch: int
    dtype: Any = F32
    interpret: Any = PLAIN
    two_stores: bool = False
    short: bool = False

    arguments = ("x", "x_weight", "dt_weight", "dt_bias", "A", "D")

    def inputs(self):
        """Return the problem, rounded to the case's dtype, dy, and the arguments."""
        height, width = self.grid
        problem = scan_oracle.make_scan2d(
            self.state,
            height=height,
            width=width,
            orders=len(self.orders),
            state=self.state,
            rank=self.rank,
            batch=self.batch,
            channels=self.channels,
        )
        dy = np.random.default_rng(7).normal(size=problem["x"].shape)
        problem["x"], dy = rounded(problem["x"], self.dtype), rounded(dy, self.dtype)
        return problem, dy, [jnp.asarray(problem[name], self.dtype if name == "x" else F32) for name in self.arguments]

    def setting(self):
        """Return arguments, cotangents, and what the oracle makes of them: results and gradients by name."""
        problem, dy, arrays = self.inputs()
        y, gradients = scan_oracle.scan2d(problem, [order.indices(*self.grid) for order in self.orders], dy)
        return arrays, [jnp.asarray(dy, self.dtype)], {"y": y}, gradients

    def plan(self, *arrays, interpret=None):
        return tpu.SCAN2D.plan(*arrays, orders=self.orders, interpret=interpret)

    def forward(self, *arrays):
        (y,) = tpu.SCAN2D.forward(self.plan(*arrays, interpret=self.interpret), arrays)
        return {"y": y}

    def backward(self, arrays, cotangents):
        gradients = tpu.SCAN2D.backward(self.plan(*arrays, interpret=self.interpret), arrays, cotangents)
        return dict(zip(self.arguments, gradients, strict=True))

    @staticmethod
    def calls(part):
        """Return the calls of a part of a plan, ``plan.forward`` or ``plan.backward``, by launch."""
        return [calls for _, problem in part for calls in problem.calls]

    def tolerance(self, name):
        # In bfloat16 the weights of both projections are rounded, and the time step between them.
        return 2e-6 if self.dtype == F32 else 2**-6


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A call of ``selective_scan``, in the form of contract.py."""

    length: int
    groups: int
    share: int  # channels of a group
    state: int
    batch: int
    softplus: bool = True
    reverse: bool = False
    optional: tuple[str, ...] = ALL
    dtype: Any = F32
    interpret: Any = PLAIN
    two_stores: bool = False
    short: bool = False

    arguments = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")

    def inputs(self):
        """Return the problem, rounded to the case's dtype, dy, and the arguments."""
        sizes = {"length": self.length, "state": self.state, "groups": self.groups, "batch": self.batch}
        problem = scan_oracle.make_scan(self.state, **sizes, share=self.share, softplus=self.softplus, optional=ALL)
        problem |= {name: problem[name] * (name in self.optional) for name in ALL}
        dy = np.random.default_rng(7).normal(size=problem["u"].shape)
        problem["u"], dy = rounded(problem["u"], self.dtype), rounded(dy, self.dtype)
        arrays = [
            jnp.asarray(self.grouped(name, problem[name]), self.dtype if name == "u" else F32)
            for name in self.arguments
        ]
        return problem, dy, arrays

    def setting(self):
        """Return arguments, cotangents, and what the oracle makes of them: results and gradients by name."""
        problem, dy, arrays = self.inputs()
        d_state = np.random.default_rng(8).normal(size=problem["initial_state"].shape)
        options = {"softplus_delta": self.softplus, "reverse": self.reverse}
        y, state, gradients = scan_oracle.scan(problem, **options, dy=dy, d_state=d_state)
        cotangents = [jnp.asarray(self.grouped("y", dy), F32), jnp.asarray(self.grouped("state", d_state), F32)]
        results = {"y": self.grouped("y", y), "state": self.grouped("state", state)}
        return arrays, cotangents, results, {name: self.grouped(name, g) for name, g in gradients.items()}

    def grouped(self, name, a):
        """Bring an array of ``selective_scan`` into the form of contract.py."""
        split = (self.groups, self.share)
        shapes = dict.fromkeys(("u", "delta", "y"), (self.batch, self.length, *split))
        shapes |= {"A": (*split, self.state), "D": split, "delta_bias": split}
        shapes |= dict.fromkeys(("initial_state", "state"), (self.batch, *split, self.state))
        a = a.reshape(shapes.get(name, a.shape))
        return a.swapaxes(-1, -2) if name in ("A", "initial_state", "state") else a

    def plan(self, *arrays, interpret=None):
        return tpu.SELECTIVE_SCAN.plan(*arrays, **self._options, interpret=interpret)

    def forward(self, *arrays):
        y, state = tpu.SELECTIVE_SCAN.forward(self.plan(*arrays, interpret=self.interpret), arrays)
        return {"y": y, "state": state}

    def backward(self, arrays, cotangents):
        gradients = tpu.SELECTIVE_SCAN.backward(self.plan(*arrays, interpret=self.interpret), arrays, cotangents)
        return dict(zip(self.arguments, gradients, strict=True))

    @staticmethod
    def calls(part):
        """Return the calls of a part of a plan, ``plan.forward`` or ``plan.backward``, by launch."""
        return list(part.calls)

    @property
    def _options(self):
        return {"delta_softplus": self.softplus, "reverse": self.reverse}

    def tolerance(self, name):
        # The time step is given: all there is to round is u, y and the gradient of u.
        return 2**-8 if self.dtype == BF16 and name in ("u", "y") else 2e-6


Case = Images | Sequences


def rounded(a, dtype):
    return np.asarray(jnp.asarray(a, dtype), np.float64)


def compiled(function, *arguments):
    return jax.device_get(jax.jit(function)(*arguments))


def assert_right(case: Case, actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, a in actual.items():
        assert a.shape == wanted[name].shape, name
        close({name: a}, {name: wanted[name]}, case.tolerance(name))


def chip(monkeypatch, *, vmem=64 * 2**20, two_stores=False, interpreted=None, gradient=None):
    """Have the kernels planned for another chip.

    ``interpreted`` has them planned for the interpreter also where a plan is all that is asked for. ``gradient`` says
    which of the two passes has so little memory; None for both.
    """
    row, of = tuning.INTERPRETED if interpreted else tuning.of_generation(5), Problem.of

    def other(interpret=None):
        mine = tuning.INTERPRETED if interpret else row
        return Chip(vmem, dataclasses.replace(mine, keep_decays=two_stores), interpret or interpreted)

    def of_pass(grid, shape, chip, **direction):
        if gradient not in (None, direction["gradient"]):
            chip = dataclasses.replace(chip, vmem=64 * 2**20)
        return of(grid, shape, chip, **direction)

    for kernels in (images, sequences):
        monkeypatch.setattr(kernels, "current_chip", other)
        kernels._plan.cache_clear()
    monkeypatch.setattr(Problem, "of", of_pass)


@pytest.fixture(autouse=True)
def interpreter():
    """Leave the interpreter as the next test wants it, also where this one made it raise."""
    yield
    pltpu.reset_tpu_interpret_mode_state()
    for kernels in (images, sequences):
        kernels._plan.cache_clear()


LAST_FIRST = Order(column_major=True, reverse=True)
THERE_AND_BACK = Chain((Order(step=(2, 2), reverse=True), Order(step=(2, 2))))
CASES: dict[str, Case] = {
    "one pixel": Images(CROSS[:2], (1, 1), 8, 1, 1, batch=1, interpret=STRICT),
    "two pixels": Images((Order(reverse=True),), (1, 2), 12, 2, 3, batch=2, interpret=STRICT),
    "cross": Images(CROSS, (7, 7), 24, 1, 2, batch=65, short=True),
    "cross, two stores": Images(CROSS, (2, 3), 8, 2, 1, batch=2, interpret=STRICT, two_stores=True),
    "atrous": Images(ATROUS, (5, 7), 8, 4, 3, batch=2, interpret=RACES),
    "atrous, bfloat16": Images(ATROUS, (7, 4), 48, 1, 9, batch=130, dtype=BF16),
    "eight states, two stores": Images((LAST_FIRST,), (3, 4), 24, 8, 2, batch=128, two_stores=True, short=True),
    "sixteen states": Images((Order(column_major=True),), (3, 2), 5, 16, 1, batch=1, interpret=STRICT, short=True),
    "chain": Images(
        (Chain((Order(), Order(column_major=True), Order(reverse=True))), LAST_FIRST),
        (3, 4),
        8,
        2,
        2,
        batch=3,
        short=True,
    ),
    "chain, bfloat16": Images((THERE_AND_BACK,), (3, 5), 16, 1, 2, batch=128, dtype=BF16),
    "mixed steps": Images(
        (Order(origin=(1, 2), step=(2, 3), column_major=True, reverse=True), Order(), Order()),
        (5, 7),
        20,
        1,
        2,
        batch=2,
        interpret=STRICT,
    ),
    "unequal sub-lattices": Images(
        (Order(step=(2, 2)), Order(step=(2, 2), reverse=True), Order(origin=(0, 1), step=(2, 2))),
        (4, 3),
        8,
        2,
        2,
        batch=66,
        interpret=RACES,
    ),
    "pixels left out, bfloat16": Images(
        (Order(origin=(1, 0), step=(2, 1)),), (5, 3), 16, 4, 2, batch=2, dtype=BF16, interpret=STRICT
    ),
    "one token": Sequences(1, 1, 8, 1, batch=1, softplus=False, optional=(), interpret=STRICT),
    "two tokens": Sequences(2, 2, 12, 2, batch=2, reverse=True, interpret=STRICT),
    "forty-nine tokens": Sequences(49, 1, 24, 4, batch=65, optional=("D", "delta_bias"), short=True),
    "sixteen states of a sequence": Sequences(
        5, 1, 8, 16, batch=2, softplus=False, optional=("initial_state",), interpret=STRICT, short=True
    ),
    # Primes: folded into lines that together are longer than the sequence.
    "a long prime": Sequences(257, 1, 5, 1, batch=3),
    "a long prime, reverse, no softplus": Sequences(263, 2, 8, 2, batch=1, softplus=False, reverse=True),
    "bfloat16 sequence": Sequences(65, 1, 48, 1, batch=130, dtype=BF16, reverse=True),
    "groups, two stores": Sequences(6, 2, 24, 8, batch=2, interpret=RACES, two_stores=True, short=True),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, monkeypatch):
    case = CASES[name]
    chip(monkeypatch, two_stores=case.two_stores)
    if case.short:
        one_token_a_turn(monkeypatch)
    arrays, cotangents, results, gradients = case.setting()

    def both(arrays, cotangents):
        return case.forward(*arrays), case.backward(arrays, cotangents)

    actual_results, actual_gradients = compiled(both, arrays, cotangents)
    assert_right(case, actual_results, results)
    assert_right(case, actual_gradients, gradients)
    own = {name: a.dtype for name, a in zip(case.arguments, arrays, strict=True)}
    assert {name: g.dtype for name, g in actual_gradients.items()} == own
    if case.interpret is RACES:
        assert interpret_pallas_call.races.races_found is False


def test_the_cases_cover_the_kernels(monkeypatch):
    """Every choice that the planner has, other than to divide a walk, is taken in some case, and not in another."""
    chip(monkeypatch)
    plans = [case.plan(*case.inputs()[2]) for case in CASES.values()]
    for direction in ("forward", "backward"):
        parts = zip(CASES.values(), plans, strict=True)
        launches = [launch for case, plan in parts for launch in case.calls(getattr(plan, direction))]
        seen = [call.block for calls in launches for call in calls]
        choices = {
            "flat": lambda b: b.flat,
            "projects the time step": lambda b: b.maths.rank > 0,
            "softplus": lambda b: b.maths.softplus,
            "exact": lambda b: b.maths.exact,
            "several blocks of channels": lambda b: b.blocks > 1,
            "several tiles in flight": lambda b: b.schedule.tiles > 1,
            "several walks": lambda b: len(b.walks) > 1,
        }
        choices |= {"sums each token": lambda b: b.schedule.sum_each_token} if direction == "backward" else {}
        for choice, taken in choices.items():
            assert {taken(block) for block in seen} == {True, False}, choice


# What each is divided into on a chip that is small enough: at least so many calls a launch, and chunks a call.
DIVIDED: dict[str, tuple[Case, int, int]] = {
    "rows": (Images((Order(),), (6, 5), 8, 2, 2, batch=1, interpret=RACES), 1, 3),
    "columns from the last": (Images((LAST_FIRST,), (3, 8), 8, 1, 1, batch=2), 1, 2),
    "parts of columns": (Images((LAST_FIRST,), (24, 2), 8, 4, 1, batch=2, interpret=RACES), 1, 4),
    "parts of rows of sub-lattices": (Images(ATROUS[:1], (3, 48), 8, 4, 1, batch=2, interpret=STRICT), 1, 4),
    "blocks of channels": (Images((Order(reverse=True),), (4, 3), 16, 2, 3, batch=65), 1, 4),
    "a long row": (Images((Order(reverse=True),), (1, 262), 8, 1, 1, batch=2), 1, 5),
    "sub-lattices": (Images(ATROUS[:3], (7, 6), 8, 2, 1, batch=2, interpret=STRICT), 1, 2),
    "four calls": (Images(CROSS, (4, 6), 8, 1, 2, batch=2), 4, 2),
    "calls that share sub-lattices, bfloat16": (
        Images((*ATROUS[:1], Order(step=(2, 2), reverse=True)), (5, 6), 16, 4, 1, batch=66, dtype=BF16),
        2,
        3,
    ),
    "a sequence": (Sequences(130, 2, 8, 2, batch=2), 1, 5),
    "a sequence, reverse": (Sequences(70, 1, 16, 1, batch=66, softplus=False, reverse=True), 1, 2),
    "a padded sequence": (Sequences(257, 1, 8, 1, batch=2, reverse=True), 1, 3),
}


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", DIVIDED)
def test_small_chips(name, gradient, monkeypatch):
    case, calls, chunks = DIVIDED[name]
    arrays, cotangents, *wanted = case.setting()
    vmem = just_too_small(case, arrays, calls, chunks, gradient=gradient)
    chip(monkeypatch, vmem=vmem, gradient=gradient)
    one_token_a_turn(monkeypatch)
    if gradient:
        assert_right(case, compiled(case.backward, arrays, cotangents), wanted[1])
    else:
        assert_right(case, compiled(case.forward, *arrays), wanted[0])
    if case.interpret is RACES:
        assert interpret_pallas_call.races.races_found is False


def just_too_small(case: Case, arrays, calls, chunks, *, gradient):
    """Return the VMEM of a chip on which every launch takes that many calls of that many chunks."""
    vmem = 2**24
    while True:
        with pytest.MonkeyPatch.context() as patch:
            chip(patch, vmem=vmem, interpreted=case.interpret, gradient=gradient)
            plan = case.plan(*arrays)
        assert not isinstance(plan, str), f"no chip divides this so: {vmem} bytes are too few for it"
        launches = case.calls(plan.backward if gradient else plan.forward)
        if all(len(own) >= calls and all(call.block.chunks >= chunks for call in own) for own in launches):
            return vmem
        vmem = vmem * 15 // 16


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            Images((THERE_AND_BACK, Order()), (40, 40), 8, 16, 1, batch=1),
            "an image of 40x40 does not fit the chip's 1 MiB of VMEM",
        ),
        (Sequences(3, 1, 8, 64, batch=1), "8 channels with 64 states do not fit the chip's memory"),
        (
            Images((Chain((Order(step=(1, 2)), Order(origin=(0, 1), step=(1, 2)))),), (3, 4), 8, 1, 1, batch=1),
            "they cannot walk a chain that leaves its sub-lattice",
        ),
        (
            Images((Order(),), (3, 4), 8, 1, 1, batch=1, dtype=jnp.dtype(jnp.float16)),
            "they take float32 and bfloat16, not float16",
        ),
    ],
)
def test_what_they_cannot_do(case, reason, monkeypatch):
    chip(monkeypatch, vmem=2**20)
    assert case.plan(*case.inputs()[2]) == reason


# ---------------------------------------------------------------------------------------------------- time steps


def test_softplus_far_out():
    """The identity for long steps, relative precision for short ones, and finite gradients everywhere."""
    raw = np.array([-200.0, -40.0, -12.0, -1.0, 0.0, 19.0, 21.0, 900.0])
    case = Sequences(8, 1, 8, 1, batch=1, optional=())
    arrays, cotangents, *_ = case.setting()
    delta = np.broadcast_to(raw[:, None, None], (1, 8, 1, 8))
    arrays[case.arguments.index("delta")] = jnp.asarray(delta, F32)
    names = [name for name in case.arguments if name not in ("D", "delta_bias", "initial_state")]
    problem = {name: np.float64(a) for name, a in zip(case.arguments, arrays, strict=True) if name in names}
    problem |= {name: problem[name][:, :, 0] for name in ("u", "delta")} | {"A": problem["A"][0].T}
    dy, d_state = (np.float64(a) for a in cotangents)
    _, _, wanted = scan_oracle.scan(
        problem, softplus_delta=True, dy=dy[:, :, 0], d_state=d_state[:, 0].swapaxes(-1, -2)
    )
    actual = compiled(case.backward, arrays, cotangents)
    # Token by token: each has a scale of its own.
    for name in ("u", "delta"):
        np.testing.assert_allclose(actual[name][:, :, 0], wanted[name], rtol=2e-5, atol=1e-37, err_msg=name)


# ------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (2, 3), (4, 3), (7, 7)])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_go_the_way_of_their_orders(column_major, reverse, rows, columns, size):
    wanted = Order(column_major=column_major, reverse=reverse).indices(rows, columns)
    for flat in (False, True):
        segment = Segment.of(column_major, reverse, rows, columns, flat=flat)
        for backwards in (False, True):
            groups = []

            def group(t, pixel, count, carry, groups=groups):
                groups.append([(int(t) + i, *(int(n) for n in pixel(i))) for i in range(count)])
                return carry + 1

            with jax.disable_jit():  # then loops are loops of Python
                turns = for_tokens(segment, size, group, backwards=backwards)
            assert turns == len(groups)
            assert max(len(group) for group in groups) <= size
            tokens = [token for group in (groups[::-1] if backwards else groups) for token in group]
            assert [t for t, *_ in tokens] == list(range(rows * columns))
            pixels = [row * (1 if flat else columns) + column for _, row, column in tokens]
            assert pixels == wanted.tolist()
            assert not flat or all(column == 0 for *_, column in tokens)


MIXED = (Order(origin=(1, 2), step=(2, 3), column_major=True, reverse=True), Order(), Order())
CHAINED = (
    Chain((Order(step=(2, 2), reverse=True), Order(step=(2, 2), column_major=True))),
    Order(step=(2, 2)),
    Order(origin=(0, 1), step=(2, 2)),
)


@pytest.mark.parametrize("orders", [CROSS, ATROUS, MIXED, CHAINED], ids=["cross", "atrous", "mixed", "chained"])
def test_grids_hold_every_order_once(orders):
    sorted_orders, found = grids(orders), {}
    for grid in sorted_orders:
        for launch in grid.launches:
            for origin in launch.origins:
                sets = grid.sets[origin[0]][origin[1]]
                assert len(sets) == len(launch.walks) <= grid.slots
                for walk in launch.walks:
                    parts = tuple(Order(origin, grid.step, *way) for way in walk.orders)
                    found.setdefault(sets[walk.slot], []).append(parts)
        visited = {(i, j) for launch in grid.launches for i, j in launch.origins}
        assert grid.whole == (len(visited) == grid.step[0] * grid.step[1])
    wanted = {k: [o.orders] for k, o in enumerate(orders)}
    assert found == wanted
    assert len({grid.step for grid in sorted_orders}) == len(sorted_orders)
