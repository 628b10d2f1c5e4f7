"""Orders as data, and ``scan2d`` along them, against loops over indices in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle

from pallas_kernels import ATROUS, CROSS, Chain, Order, scan2d

# Unequal steps, so unequal lengths; overlapping, backwards, and one order twice.
MIXED = (Order(origin=(1, 2), step=(2, 3), column_major=True, reverse=True), Order(), Order())
# Two walks that share pixels and pass through padding; a chain of one, as long as the order beside it.
CHAINED = (
    Chain((Order(step=(2, 2), reverse=True), Order(column_major=True), Order(origin=(1, 0), step=(2, 3)))),
    Order(),
    Chain((Order(column_major=True, reverse=True),)),
)
EVERY = sorted({*ATROUS, *CROSS, *MIXED, *CHAINED, Order(origin=(0, 1), step=(1, 2), reverse=True)}, key=repr)
GRIDS = [(6, 4), (7, 5), (4, 7), (1, 1), (2, 3)]


def close(actual, wanted, tolerance):
    scale = jax.tree.map(lambda w: np.abs(w).max() + 1e-30, wanted)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a, s: np.asarray(a, np.float64) / s, actual, scale),
        jax.tree.map(lambda w, s: w / s, wanted, scale),
        atol=tolerance,
        rtol=0,
    )


def test_atrous_worked_example():
    """The released gather on a 3x5 map numbered row by row, -1 for padding."""
    walks = [order.indices(3, 5).tolist() for order in ATROUS]
    assert walks == [
        [0, 2, 4, 10, 12, 14],
        [5, -1, 7, -1, 9, -1],
        [1, 3, -1, 11, 13, -1],
        [6, -1, 8, -1, -1, -1],
    ]


def test_cross_worked_example():
    walks = [order.indices(2, 3).tolist() for order in CROSS]
    assert walks == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


def test_user_order_worked_example():
    assert MIXED[0].indices(4, 5).tolist() == [-1, -1, 17, 7]


def test_chain_worked_example():
    """The three low-resolution walks of MSVMamba, one after another."""
    chain = Chain((Order(reverse=True), Order(column_major=True), Order(column_major=True, reverse=True)))
    assert chain.indices(2, 3).tolist() == [5, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2, 5, 5, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", EVERY)
def test_reading_and_writing_follow_the_indices(order, grid):
    height, width = grid
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    walk = order.indices(height, width)
    assert len(walk) == order.length(height, width)
    read, written = np.zeros((2, len(walk), 3), np.float32), np.zeros_like(image)
    sequence = rng.normal(size=read.shape).astype(np.float32)
    for token, pixel in enumerate(walk):
        if pixel >= 0:
            read[:, token] = image[:, pixel // width, pixel % width]
            written[:, pixel // width, pixel % width] += sequence[:, token]
    chex.assert_trees_all_equal(np.asarray(order.read(image)), read)
    # What a token in the padding holds must not reach the image.
    sequence[:, walk < 0] = np.nan
    actual = np.asarray(order.write(jnp.asarray(sequence), height, width))
    # Equal to the bit where each pixel is visited once; a chain may add up in another order.
    chex.assert_trees_all_close(actual, written, rtol=0, atol=1e-6 if isinstance(order, Chain) else 0)


def test_the_state_of_a_chain_runs_on():
    """Two pixels, each an order of its own: what the second one writes, from the written recurrence."""
    first, second = Order(step=(1, 2)), Order(origin=(0, 1), step=(1, 2))
    x, step, decay = np.array([3.0, -2.0]), np.log1p(np.exp(0.7)), -0.4
    own = x[1] * (step * x[1] * x[1])  # B = C = x
    carried = x[1] * np.exp(step * decay) * (step * x[0] * x[0])

    def run(orders):
        one = functools.partial(np.full, dtype=np.float32)
        weights = (one((1, 1, 3), 1), one((1, 1, 1), 0), one((1, 1), 0.7), one((1, 1, 1), decay), one((1, 1), 0))
        weights = [np.repeat(w, len(orders), 0) for w in weights]
        return scan2d(jnp.float32(x).reshape(1, 1, 2, 1), *weights, orders=orders)[0, 0, 1, 0]

    np.testing.assert_allclose(run((Chain((first, second)),)), own + carried, rtol=1e-6)
    np.testing.assert_allclose(run((first, second)), own, rtol=1e-6)
    np.testing.assert_allclose(run((Chain((second, first)),)), own, rtol=1e-6)


@pytest.mark.parametrize("orders", [ATROUS, CHAINED], ids=["atrous", "chained"])
def test_no_gather_and_no_scatter(orders):
    """Index arrays are slow on a TPU: reading and writing must lower to slices, transposes, flips and pads."""
    problem = {
        n: jnp.float32(a)
        for n, a in scan_oracle.make_scan2d(0, height=5, width=6, orders=len(orders), state=2, rank=1).items()
    }

    def loss(problem):
        return scan2d(**problem, orders=orders).sum()

    text = jax.jit(jax.grad(loss)).lower(problem).as_text()
    assert "stablehlo.gather" not in text
    assert "stablehlo.scatter" not in text


@pytest.mark.parametrize(
    ("implementation", "wide"), [("associative", False), ("sequential", False), ("sequential", True)]
)
@pytest.mark.parametrize(
    ("orders", "grid"),
    [(ATROUS, (6, 4)), (ATROUS, (7, 5)), (ATROUS, (1, 1)), (CROSS, (9, 8)), (MIXED, (5, 7)), (CHAINED, (5, 4))],
    ids=["atrous-even", "atrous-odd", "atrous-one", "cross", "mixed", "chained"],
)
def test_output_and_gradients(orders, grid, implementation, wide):
    problem = scan_oracle.make_scan2d(1, height=grid[0], width=grid[1], orders=len(orders), state=3, rank=2)
    dy = np.random.default_rng(2).normal(size=problem["x"].shape)
    wanted = scan_oracle.scan2d(problem, [order.indices(*grid) for order in orders], dy)

    @jax.jit
    def program(problem, dy):
        y, pull = jax.vjp(lambda p: scan2d(**p, orders=orders, implementation=implementation), problem)
        return y, *pull(dy)

    dtype = np.float64 if wide else np.float32
    with jax.enable_x64(wide):
        actual = program(jax.tree.map(dtype, problem), dtype(dy))
    chex.assert_trees_all_equal_dtypes(actual, jax.tree.map(dtype, wanted))
    close(actual, wanted, 1e-12 if wide else 1e-5)


def test_bfloat16_image():
    """Directions add up in float32: the only roundings are those of the inputs and of the result."""
    problem = scan_oracle.make_scan2d(3, height=6, width=5, orders=4, state=4, rank=2)
    arrays = jax.tree.map(jnp.float32, problem) | {"x": jnp.bfloat16(problem["x"])}
    wanted, _ = scan_oracle.scan2d(arrays, [order.indices(6, 5) for order in CROSS], np.zeros(problem["x"].shape))
    y = scan2d(**arrays, orders=CROSS)
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float64) - wanted)
    assert (error <= 2.0**-8 * np.abs(wanted) + 1e-5).all()


def test_vmap_and_checkpoint():
    problem = scan_oracle.make_scan2d(4, height=5, width=6, orders=4, state=2, rank=2, batch=6)
    dy = np.random.default_rng(5).normal(size=problem["x"].shape)
    _, wanted = scan_oracle.scan2d(problem, [order.indices(5, 6) for order in ATROUS], dy)
    arrays, weights = jax.tree.map(jnp.float32, problem), jnp.float32(dy).reshape(3, 2, 5, 6, 5)

    def loss(p):
        x = p["x"].reshape(3, 2, *p["x"].shape[1:])
        rest = {n: a for n, a in p.items() if n != "x"}
        y = jax.vmap(lambda x: scan2d(x, **rest, orders=ATROUS))(x)
        return (y * weights).sum()

    close(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays), wanted, 1e-5)


@pytest.mark.parametrize("orders", [ATROUS, CROSS], ids=["atrous", "cross"])
def test_no_array_of_all_states(orders):
    batch, side, channels, state, rank = 2, 28, 64, 16, 4
    s = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    problem = {
        "x": s((batch, side, side, channels)),
        "x_weight": s((4, channels, rank + 2 * state)),
        "dt_weight": s((4, rank, channels)),
        "dt_bias": s((4, channels)),
        "A": s((4, channels, state)),
        "D": s((4, channels)),
    }

    def loss(problem):
        return scan2d(**problem, orders=orders).sum()

    tokens = sum(order.length(side, side) for order in orders)
    states = 4 * batch * tokens * channels * state
    for function in (loss, jax.grad(loss)):
        temporary = jax.jit(function).lower(problem).compile().memory_analysis().temp_size_in_bytes
        assert temporary < states


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((2, 3, 5), np.float32)}, ValueError, "x has shape (2, 3, 5), expected (B, H, W, E)"),
        (
            {"x_weight": np.ones((3, 5, 5), np.float32)},
            ValueError,
            "x_weight has shape (3, 5, 5), expected (K=4, E=5, R+2N)",
        ),
        (
            {"x_weight": np.ones((4, 5, 6), np.float32)},
            ValueError,
            "x_weight has a last axis of 6, expected R + 2N = 5 with R=1 of dt_weight and N=2 of A",
        ),
        (
            {"dt_weight": np.ones((4, 1, 6), np.float32)},
            ValueError,
            "dt_weight has shape (4, 1, 6), expected (K, R, E=5)",
        ),
        ({"dt_bias": np.ones(5, np.float32)}, ValueError, "dt_bias has shape (5,), expected (K=4, E=5)"),
        ({"A": np.ones((4, 2, 5), np.float32)}, ValueError, "A has shape (4, 2, 5), expected (K=4, E=5, N)"),
        ({"D": np.ones((5, 4), np.float32)}, ValueError, "D has shape (5, 4), expected (K=4, E=5)"),
        ({"x": np.ones((2, 0, 4, 5), np.float32)}, ValueError, "x has shape (2, 0, 4, 5), but H must be at least 1"),
        ({"orders": CROSS[:2]}, ValueError, "2 orders were given, but dt_weight has K=4 sets of parameters"),
        ({"orders": ("rows",) * 4}, TypeError, "orders must hold Order or Chain values, got str"),
        ({"x": np.ones((2, 3, 4, 5), int)}, TypeError, "x must hold floating-point numbers, got int"),
        (
            {"implementation": "asociative"},
            ValueError,
            "implementation='asociative' is not known; choose from None, 'associative', 'sequential', "
            "'pallas', 'pallas_interpret', did you mean 'associative'?",
        ),
        (
            {"axis_name": "model"},
            ValueError,
            "axis_name='model' must be an axis of the jax.shard_map around the call, but there is none",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    problem = jax.tree.map(jnp.float32, scan_oracle.make_scan2d(0, height=3, width=4, orders=4, state=2, rank=1))
    with pytest.raises(error) as caught:
        scan2d(**({"orders": CROSS} | problem | change))
    assert str(caught.value).startswith("scan2d: " + message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": (0, 1)}, "step=(0, 1) must be at least 1"),
        ({"origin": (2, 0), "step": (2, 2)}, "origin=(2, 0) must lie in [0, step) for step=(2, 2)"),
        ({"origin": (0, -1)}, "origin=(0, -1) must lie in [0, step)"),
        ({"step": 2}, "step=2 must be a tuple of two integers"),
    ],
)
def test_wrong_orders(values, message):
    with pytest.raises(ValueError, match="Order: ") as caught:
        Order(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("orders", "error", "message"),
    [
        ((), ValueError, "Chain: orders is empty; give at least one Order"),
        ([Order()], TypeError, "Chain: orders must be a tuple of Order values, got list"),
        ((Order(), "rows"), TypeError, "Chain: orders must hold Order values, got str"),
        ((Chain((Order(),)),), TypeError, "Chain: orders must hold Order values, got Chain"),
    ],
)
def test_wrong_chains(orders, error, message):
    with pytest.raises(error) as caught:
        Chain(orders)
    assert str(caught.value) == message
