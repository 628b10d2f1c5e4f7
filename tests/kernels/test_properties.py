"""What holds for every scan: random problems, and no reference but the scan itself and a running sum."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selective_scan import ALL, close

from pallas_kernels import ATROUS, CROSS, Chain, Order, scan2d, selective_scan

BOTH_WAYS = (Order(), Order(column_major=True, reverse=True))
THERE_AND_BACK = (Chain((Order(column_major=True), Order(reverse=True))), Order())
# A program of one size serves many examples. Pallas's interpreter takes seconds to compile one.
SIZES = {
    "sequential": {
        "length": [2, 7, 70],
        "groups": [1, 2],
        "state": [1, 4],
        "grid": [(5, 4)],
        "orders": [CROSS, BOTH_WAYS, THERE_AND_BACK],
    },
    "pallas_interpret": {"length": [6], "groups": [1], "state": [1], "grid": [(2, 3)], "orders": [BOTH_WAYS]},
}
EXAMPLES = {"sequential": 60, "pallas_interpret": 8}


def holds_for_random_problems(check):
    """Make a test of a function of (implementation, draw), where ``draw`` takes a name of SIZES or a strategy."""

    @pytest.mark.parametrize("implementation", SIZES)
    def test(implementation):
        @settings(max_examples=EXAMPLES[implementation], deadline=None, derandomize=True, database=None)
        @given(st.data())
        def every(data):
            def draw(what):
                sizes = SIZES[implementation]
                return data.draw(st.sampled_from(sizes[what]) if what in sizes else what, label=str(what))

            check(implementation, draw)

        every()

    test.__doc__ = check.__doc__
    return test


SEEDS = st.integers(0, 2**32 - 1)
SHIFTS = st.floats(-6, 3)  # of the raw time step
SPEEDS = st.floats(-4, 4)  # logarithm of the decay for one time step


def sequences(draw):
    """Return random arguments of ``selective_scan`` in float32."""
    sizes = {name: draw(name) for name in ("length", "state", "groups")}
    problem = scan_oracle.make_scan(draw(SEEDS), **sizes, share=8 // sizes["groups"], optional=ALL)
    problem["delta"] += draw(SHIFTS)
    problem["A"] *= np.exp(draw(SPEEDS))
    return {name: np.float32(a) for name, a in problem.items()}


def images(draw, grid, orders):
    """Return random arguments of ``scan2d`` in float32."""
    sizes = {"height": grid[0], "width": grid[1], "orders": len(orders), "state": 2, "rank": 2}
    problem = scan_oracle.make_scan2d(draw(SEEDS), **sizes, channels=8)
    problem["dt_bias"] += draw(SHIFTS)
    problem["A"] *= np.exp(draw(SPEEDS))
    return {name: np.float32(a) for name, a in problem.items()}


def scan(problem, implementation, **options):
    options |= {"delta_softplus": True, "return_final_state": True, "implementation": implementation}
    return selective_scan(**problem, **options)


def along(problem, change, names=("u", "delta", "B", "C")):
    """Return a problem with some of its arrays changed."""
    return problem | {name: change(problem[name]) for name in names}


@holds_for_random_problems
def test_without_decay_the_state_is_a_running_sum(implementation, draw):
    problem = sequences(draw)
    problem["A"] = np.full_like(problem["A"], -1e-30)
    p = {name: np.float64(a) for name, a in problem.items()}
    dt = scan_oracle.softplus(p["delta"] + p["delta_bias"])
    share = p["u"].shape[2] // p["B"].shape[2]
    B, C = (np.repeat(p[name], share, axis=2) for name in "BC")
    states = p["initial_state"][:, None] + np.cumsum((dt * p["u"])[..., None] * B, axis=1)
    y = (C * states).sum(-1) + p["D"] * p["u"]
    close(scan(problem, implementation), (y, states[:, -1]), 1e-5)


@holds_for_random_problems
def test_a_state_carried_over_joins_two_halves(implementation, draw):
    problem = sequences(draw)
    half = problem["u"].shape[1] // 2
    first, state = scan(along(problem, lambda a: a[:, :half]), implementation)
    second, last = scan(along(problem, lambda a: a[:, half:]) | {"initial_state": state}, implementation)
    close((jnp.concatenate([first, second], 1), last), scan(problem, implementation), 1e-5)


@holds_for_random_problems
def test_a_reversed_sequence_in_reversed_order(implementation, draw):
    problem = sequences(draw)
    y, state = scan(along(problem, lambda a: a[:, ::-1]), implementation, reverse=True)
    close((y[:, ::-1], state), scan(problem, implementation), 1e-6)


@holds_for_random_problems
def test_what_comes_after_or_beside_changes_nothing(implementation, draw):
    problem = sequences(draw)
    batch, length, channels = problem["u"].shape
    more = np.random.default_rng(draw(SEEDS))

    def longer(a):
        a = np.concatenate([a, more.normal(size=(batch, 1, *a.shape[2:]))], 1)
        return np.float32(np.concatenate([a, more.normal(size=a.shape)], 0))

    larger = along(problem, longer)
    larger = along(larger, lambda a: np.concatenate([a, a]), ["initial_state"])
    if problem["B"].shape[2] == 1:  # channels that share B and C
        larger = along(larger, lambda a: np.concatenate([a, -a], -1), ["u", "delta", "D", "delta_bias"])
        larger = along(larger, lambda a: np.concatenate([a, a]), ["A"])
        larger = along(larger, lambda a: np.concatenate([a, a], 1), ["initial_state"])
    y, _ = scan(larger, implementation)
    close(y[:batch, :length, :channels], scan(problem, implementation)[0], 1e-6)


@holds_for_random_problems
def test_permuted_channels(implementation, draw):
    problem = sequences(draw)
    groups, channels = problem["B"].shape[2], problem["u"].shape[2]
    of_group = np.array(draw(st.permutations(range(channels // groups))))
    order = np.concatenate([of_group + g * len(of_group) for g in range(groups)])
    turned = along(problem, lambda a: a[..., order], ["u", "delta", "D", "delta_bias"])
    turned = along(turned, lambda a: a[order], ["A"])
    turned = along(turned, lambda a: a[:, order], ["initial_state"])
    y, state = scan(problem, implementation)
    close(scan(turned, implementation), (y[..., order], state[:, order]), 1e-6)


@holds_for_random_problems
def test_an_image_turned_upside_down(implementation, draw):
    """Half a turn of the image, and every order backwards, turns the result."""
    orders, grid = draw("orders"), draw("grid")
    problem = images(draw, grid, orders)

    def backwards(order):
        if isinstance(order, Chain):
            return Chain(tuple(backwards(part) for part in order.orders))
        return Order(column_major=order.column_major, reverse=not order.reverse)

    run = functools.partial(scan2d, implementation=implementation)
    turned = run(**along(problem, lambda a: a[:, ::-1, ::-1], ["x"]), orders=tuple(map(backwards, orders)))
    close(turned[:, ::-1, ::-1], run(**problem, orders=orders), 1e-6)


@holds_for_random_problems
def test_zeros_at_the_bottom_and_the_right(implementation, draw):
    """Padding an odd map by hand, and cutting the result, is what the orders do."""
    orders = ATROUS[1:3]  # one by rows, one by columns
    problem = images(draw, (3, 5), orders)
    run = functools.partial(scan2d, orders=orders, implementation=implementation)
    padded = along(problem, lambda a: np.pad(a, [(0, 0), (0, 1), (0, 1), (0, 0)]), ["x"])
    close(run(**padded)[:, :3, :5], run(**problem), 1e-6)


@holds_for_random_problems
def test_permuted_channels_and_orders_of_an_image(implementation, draw):
    orders, grid = draw("orders"), draw("grid")
    problem = images(draw, grid, orders)
    channels = np.array(draw(st.permutations(range(8))))
    sequence = np.array(draw(st.permutations(range(len(orders)))))
    turned = along(problem, lambda a: a[..., channels], ["x", "dt_weight", "dt_bias", "D"])
    turned = along(turned, lambda a: a[:, channels], ["A", "x_weight"])
    turned = along(turned, lambda a: a[sequence], ["x_weight", "dt_weight", "dt_bias", "A", "D"])
    run = functools.partial(scan2d, implementation=implementation)
    y = run(**turned, orders=tuple(orders[k] for k in sequence))
    close(y, run(**problem, orders=orders)[..., channels], 2e-6)
