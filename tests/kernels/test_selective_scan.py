"""``selective_scan`` against the float64 loop, and in every place where people put it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import selective_scan

BOTH = ("associative", "sequential")
ALL = ("D", "delta_bias", "initial_state")
SHARED = ("A", "D", "delta_bias")  # by the sequences of a batch

# length, state, groups, optional arguments, softplus, reverse: every two values of two columns meet.
CASES = [
    (1, 1, 1, (), False, False),
    (1, 8, 2, ALL, True, True),
    (1, 16, 4, ("D", "initial_state"), True, False),
    (7, 1, 2, ("D", "delta_bias"), True, False),
    (7, 8, 4, ("initial_state",), False, True),
    (7, 16, 1, ALL, True, True),
    (49, 1, 4, ALL, True, True),
    (49, 8, 1, ("D",), True, False),
    (49, 16, 2, ("delta_bias", "initial_state"), False, False),
    (196, 1, 1, ("delta_bias", "initial_state"), True, False),
    (196, 8, 2, (), True, True),
    (196, 16, 4, ALL, False, False),
    (785, 1, 2, ("D", "initial_state"), False, True),
    (785, 8, 4, ("delta_bias",), False, False),
    (785, 16, 1, ALL, True, False),
]


def close(actual, wanted, tolerance):
    """Assert that trees agree, each leaf relative to its largest value."""
    scale = jax.tree.map(lambda w: np.abs(w).max() + 1e-30, wanted)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a, s: np.asarray(a, np.float64) / s, actual, scale),
        jax.tree.map(lambda w, s: np.asarray(w, np.float64) / s, wanted, scale),
        atol=tolerance,
        rtol=0,
    )


def cast(problem, dtype):
    return {name: jnp.asarray(a, dtype) for name, a in problem.items()}


def run(problem, cotangents, **options):
    """Return outputs and gradients of ``selective_scan`` in one compiled program."""

    @jax.jit
    def program(problem, cotangents):
        outputs, pull = jax.vjp(lambda p: selective_scan(**p, return_final_state=True, **options), problem)
        return *outputs, *pull(cotangents)

    return program(problem, cotangents)


def cotangents_for(problem, seed=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=problem["u"].shape), rng.normal(size=(problem["u"].shape[0], *problem["A"].shape))


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize(("length", "state", "groups", "optional", "softplus", "reverse"), CASES)
def test_output_state_and_gradients(length, state, groups, optional, softplus, reverse, implementation):
    problem = scan_oracle.make_scan(
        length, length=length, state=state, groups=groups, optional=optional, softplus=softplus
    )
    dy, d_state = cotangents_for(problem)
    wanted = scan_oracle.scan(problem, softplus_delta=softplus, reverse=reverse, dy=dy, d_state=d_state)
    options = {"delta_softplus": softplus, "reverse": reverse, "implementation": implementation}
    cotangents = jnp.asarray(dy, jnp.float32), jnp.asarray(d_state, jnp.float32)
    actual = run(cast(problem, jnp.float32), cotangents, **options)
    chex.assert_trees_all_equal_dtypes(actual, jax.tree.map(np.float32, wanted))
    close(actual, wanted, 1e-5)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("narrow", ["A", "u", None])
def test_float64_stays_float64(narrow, implementation):
    """One float64 argument suffices; only the argument that is itself narrower gives narrower results."""
    problem = scan_oracle.make_scan(3, length=70, state=4, groups=2, optional=ALL)
    if narrow:
        problem[narrow] = np.float32(problem[narrow])
    dy, d_state = cotangents_for(problem)
    if narrow == "u":
        dy = np.float32(dy)
    wanted = scan_oracle.scan(problem, softplus_delta=True, dy=dy, d_state=d_state)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(a) for name, a in problem.items()}
        y, final, grads = run(
            arrays,
            (jnp.asarray(dy), jnp.asarray(d_state)),
            delta_softplus=True,
            implementation=implementation,
        )
        assert y.dtype == (jnp.float32 if narrow == "u" else jnp.float64)
        assert final.dtype == jnp.float64
        assert all(grads[name].dtype == arrays[name].dtype for name in arrays)
        exact = {name: 1e-6 if name == narrow else 1e-12 for name in arrays}
        close(y, wanted[0], 1e-6 if narrow == "u" else 1e-12)
        close(final, wanted[1], 1e-12)
        for name, gradient in grads.items():
            close(gradient, wanted[2][name], exact[name])


@pytest.mark.parametrize("implementation", BOTH)
def test_bfloat16_inputs_have_a_float32_recurrence(implementation):
    problem = cast(scan_oracle.make_scan(4, length=196, state=8, groups=2, optional=ALL), jnp.float32)
    half = {name: problem[name].astype(jnp.bfloat16) for name in ("u", "delta", "B", "C")}
    problem |= half
    dy, d_state = cotangents_for(problem)
    dy = jnp.asarray(dy, jnp.bfloat16)
    wanted = scan_oracle.scan(problem, softplus_delta=True, dy=np.asarray(dy, np.float64), d_state=d_state)
    y, final, grads = run(
        problem, (dy, jnp.asarray(d_state, jnp.float32)), delta_softplus=True, implementation=implementation
    )
    assert y.dtype == jnp.bfloat16
    close(y, wanted[0], 2**-8)
    close(final, wanted[1], 1e-5)
    for name, gradient in grads.items():
        assert gradient.dtype == problem[name].dtype
        close(gradient, wanted[2][name], 2**-8 if name in half else 1e-5)


@pytest.mark.parametrize("implementation", BOTH)
def test_softplus_is_the_identity_beyond_20(implementation):
    """As PyTorch's, with a finite gradient where the exponential would overflow."""
    problem = scan_oracle.make_scan(5, length=5, state=2, groups=1)
    problem["delta"] = problem["delta"] * 0 + np.array([-200.0, -1.0, 19.0, 21.0, 900.0])[:, None]
    dy, d_state = cotangents_for(problem)
    wanted = scan_oracle.scan(problem, softplus_delta=True, dy=dy, d_state=d_state)
    cotangents = jnp.asarray(dy, jnp.float32), jnp.asarray(d_state, jnp.float32)
    close(run(cast(problem, jnp.float32), cotangents, delta_softplus=True, implementation=implementation), wanted, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_in_two_halves(reverse):
    problem = cast(scan_oracle.make_scan(6, length=150, state=4, groups=2, optional=ALL), jnp.float32)
    scan = functools.partial(selective_scan, delta_softplus=True, reverse=reverse, return_final_state=True)
    whole, last = scan(**problem)
    halves = [{n: a[:, part] if n in ("u", "delta", "B", "C") else a for n, a in problem.items()}
              for part in (slice(0, 61), slice(61, None))]  # fmt: skip
    first, second = halves[::-1] if reverse else halves
    y1, state = scan(**first)
    y2, state = scan(**(second | {"initial_state": state}))
    close(jnp.concatenate([y2, y1] if reverse else [y1, y2], 1), whole, 1e-6)
    close(state, last, 1e-6)


def setting(length=70):
    """Return a problem, the weights of a loss (the sum of y times them), and the oracle's gradients of that loss."""
    problem = scan_oracle.make_scan(8, length=length, state=4, groups=2, batch=8, optional=ALL)
    weights, _ = cotangents_for(problem)
    wanted = scan_oracle.scan(problem, softplus_delta=True, dy=weights)[2]
    return cast(problem, jnp.float32), jnp.asarray(weights, jnp.float32), wanted


def loss(problem, weights, implementation=None):
    return (selective_scan(**problem, delta_softplus=True, implementation=implementation) * weights).sum()


def test_vmap():
    """One more batch axis, over the sequences but not over the parameters."""
    problem, weights, wanted = setting()
    axes = {name: None if name in SHARED else 0 for name in problem}
    split = {n: a if axes[n] is None else a.reshape(4, 2, *a.shape[1:]) for n, a in problem.items()}

    @jax.jit
    @jax.grad
    def gradient(problem):
        return jax.vmap(loss, in_axes=(axes, 0))(problem, weights.reshape(4, 2, *weights.shape[1:])).sum()

    close({n: a.reshape(problem[n].shape) for n, a in gradient(split).items()}, wanted, 1e-5)


@pytest.mark.parametrize("implementation", BOTH)
def test_checkpoint(implementation):
    problem, weights, wanted = setting()
    remat = jax.checkpoint(functools.partial(loss, implementation=implementation))
    close(jax.jit(jax.grad(remat))(problem, weights), wanted, 1e-5)


def test_without_jit():
    problem, weights, wanted = setting(length=7)
    close(jax.grad(loss)(problem, weights), wanted, 1e-5)


def test_several_calls_add_their_gradients():
    problem, weights, once = setting()
    turned = problem | {"u": -problem["u"]}
    twice = scan_oracle.scan(turned, softplus_delta=True, dy=2 * np.asarray(weights))[2]
    wanted = {n: once[n] - twice[n] if n == "u" else once[n] + twice[n] for n in once}

    def both(problem):
        return loss(problem, weights) + loss(problem | {"u": -problem["u"]}, 2 * weights)

    close(jax.jit(jax.grad(both))(problem), wanted, 1e-5)


def test_donated_inputs():
    problem, _, _ = setting()
    wanted, _ = scan_oracle.scan(problem, softplus_delta=True)
    rest = {name: a for name, a in problem.items() if name != "u"}
    u = jnp.array(problem["u"])
    program = jax.jit(lambda u, rest: selective_scan(u=u, **rest, delta_softplus=True), donate_argnums=0)
    close(program(u, rest), wanted, 1e-5)
    assert u.is_deleted()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_batch_over_devices(axis_type):
    problem, weights, wanted = setting()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        placed = {n: jax.device_put(a, whole if n in SHARED else rows) for n, a in problem.items()}
        compiled = jax.jit(jax.grad(loss)).lower(placed, jax.device_put(weights, rows)).compile()
        grads = compiled(placed, jax.device_put(weights, rows))
        close(jax.device_get(grads), wanted, 1e-5)
    assert not grads["u"].sharding.is_fully_replicated
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("implementation", BOTH)
def test_inside_shard_map(implementation):
    problem, weights, wanted = setting()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    specs = {n: PartitionSpec() if n in SHARED else rows for n in problem}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, rows), out_specs=PartitionSpec())
    def total(problem, weights):
        return jax.lax.psum(loss(problem, weights, implementation), "data")

    close(jax.jit(jax.grad(total))(problem, weights), wanted, 1e-5)


def big(batch=2, length=784, groups=4, share=32, state=16):
    """Return abstract arguments, and the bytes of one (batch, length, channels, state) array."""
    s = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    channels = groups * share
    sequence, weights = s((batch, length, channels)), s((batch, length, groups, state))
    return (sequence, sequence, s((channels, state)), weights, weights), 4 * batch * length * channels * state


def temporaries(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def summed(function):
    return jax.grad(lambda *arguments: function(*arguments).sum(), argnums=tuple(range(5)))


def test_no_array_of_all_states():
    arguments, states = big()
    assert temporaries(selective_scan, *arguments) < states / 16
    assert temporaries(summed(selective_scan), *arguments) < states / 2
    # The measure sees such an array where there is one.
    assert temporaries(functools.partial(selective_scan, implementation="associative"), *arguments) > states


def test_memory_grows_with_the_root_of_the_length():
    """Four times the tokens: twice the states at the borders and inside a chunk."""
    (short, _), (long, _) = big(length=784), big(length=3136)
    grown = temporaries(summed(selective_scan), *long) / temporaries(summed(selective_scan), *short)
    assert grown < 3


@pytest.mark.parametrize("wrap", [lambda f: f, summed], ids=["forward", "backward"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_platform_is_chosen_at_lowering(platform, wrap):
    """A CPU host lowers for other platforms, and there the portable loop over tokens is unrolled."""
    arguments, _ = big(length=32)
    traced = jax.jit(wrap(functools.partial(selective_scan, implementation="sequential"))).trace(*arguments)
    here, there = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", platform))
    # The body of a loop is a function; eight tokens a turn are eight calls of it.
    assert there.count("func.call") >= here.count("func.call") + 7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": np.ones((2, 5), np.float32)}, ValueError, "u has shape (2, 5), expected (batch, length, channels)"),
        (
            {"delta": np.ones((2, 4, 6), np.float32)},
            ValueError,
            "delta has shape (2, 4, 6), expected (batch=2, length=5, channels=6)",
        ),
        ({"A": np.ones((3, 6), np.float32)}, ValueError, "A has shape (3, 6), expected (channels=6, state)"),
        (
            {"B": np.ones((2, 5, 3), np.float32)},
            ValueError,
            "B has shape (2, 5, 3), expected (batch=2, length=5, groups, state=3)",
        ),
        (
            {"C": np.ones((2, 5, 1, 3), np.float32)},
            ValueError,
            "C has shape (2, 5, 1, 3), expected (batch=2, length=5, groups=2, state=3)",
        ),
        ({"D": np.ones(5, np.float32)}, ValueError, "D has shape (5,), expected (channels=6)"),
        ({"delta_bias": np.ones((), np.float32)}, ValueError, "delta_bias has shape (), expected (channels=6)"),
        (
            {"initial_state": np.ones((2, 3, 6), np.float32)},
            ValueError,
            "initial_state has shape (2, 3, 6), expected (batch=2, channels=6, state=3)",
        ),
        ({"u": np.ones((2, 0, 6), np.float32)}, ValueError, "u has shape (2, 0, 6), but length must be at least 1"),
        (
            {"B": np.ones((2, 5, 4, 3), np.float32), "C": np.ones((2, 5, 4, 3), np.float32)},
            ValueError,
            "B has 4 groups, which do not divide the 6 channels of u",
        ),
        ({"u": np.ones((2, 5, 6), int)}, TypeError, "u must hold floating-point numbers, got int"),
        ({"A": [[1.0]]}, TypeError, "A must be an array, got list"),
        (
            {"implementation": "sequental"},
            ValueError,
            "implementation='sequental' is not known; choose from None, 'associative', 'sequential', "
            "'pallas', 'pallas_interpret', did you mean 'sequential'?",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    problem = cast(scan_oracle.make_scan(0, length=5, state=3, groups=2), jnp.float32)
    with pytest.raises(error) as caught:
        selective_scan(**(problem | change))
    assert str(caught.value).startswith("selective_scan: " + message)
    assert "\n" not in str(caught.value)


def test_time_steps_are_softplus_to_rounding():
    """A zero state, u = B = C = 1 and D = 0: y is the first token's time step, and its slope the logistic function."""
    raw = np.linspace(-80, 80, 3201).astype(np.float32)
    one, wide = jnp.ones((1, 1, raw.size)), raw.astype(np.float64)

    def steps(raw):
        state = jnp.ones((1, 1, 1, 1))
        return selective_scan(
            one,
            raw[None, None],
            jnp.zeros((raw.size, 1)),
            state,
            state,
            delta_softplus=True,
            implementation="sequential",
        )[0, 0]

    y, pull = jax.vjp(steps, jnp.asarray(raw))
    np.testing.assert_allclose(y, np.logaddexp(0, wide), rtol=4e-7)
    np.testing.assert_allclose(pull(jnp.ones(raw.size))[0], 1 / (1 + np.exp(-wide)), rtol=5e-7)
