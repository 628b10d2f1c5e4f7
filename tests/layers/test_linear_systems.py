"""S4D and S5 against their recurrences, token by token; initial values; types; devices."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax.arrays import merge, split
from evmamba_jax.counting.program import equations
from evmamba_jax.errors import UserError
from evmamba_jax.layers.s4d import S4D
from evmamba_jax.layers.s5 import S5, recur


def complex_of(pairs):
    return pairs[..., 0] + 1j * pairs[..., 1]


def states(decay, inputs, reverse):
    """Return the states (B, L, ...) of a system with these inputs, token by token."""
    x, found = np.zeros_like(inputs[:, 0]), []
    for t in range(inputs.shape[1])[:: -1 if reverse else 1]:
        x = decay * x + inputs[:, t]
        found.append(x)
    return np.stack(found[:: -1 if reverse else 1], 1)


def slow_s4d(p, u, bidirectional):
    y = p["D"] * u
    for prefix in ("", "backward_")[: 1 + bidirectional]:
        log_dt, log_a_real, imaginary, c = (p[prefix + name] for name in ("log_dt", "log_A_real", "A_imag", "C"))
        a = -np.exp(log_a_real) + 1j * imaginary
        decay = np.exp(np.exp(log_dt)[:, None] * a)
        inputs = (decay - 1) / a * u[..., None]
        y = y + 2 * (states(decay, inputs, prefix != "") * complex_of(c)).sum(-1).real
    return y


def slow_s5(p, u, bidirectional, discretization):
    lambda_, dt = p["Lambda_re"] + 1j * p["Lambda_im"], np.exp(p["log_step"][:, 0])
    if discretization == "zoh":
        decay, factor = np.exp(lambda_ * dt), (np.exp(lambda_ * dt) - 1) / lambda_
    else:
        decay, factor = (1 + dt * lambda_ / 2) / (1 - dt * lambda_ / 2), dt / (1 - dt * lambda_ / 2)
    inputs = u @ (factor[:, None] * complex_of(p["B"])).T
    x = np.concatenate([states(decay, inputs, reverse) for reverse in (False, True)[: 1 + bidirectional]], -1)
    return 2 * (x @ complex_of(p["C"]).T).real + p["D"] * u


def run(layer, dtype, length):
    """Return random float64 parameters near the initial ones, an input, and what the layer makes of it in a type."""
    rng = np.random.default_rng(0)
    graphdef, params, _ = split(layer)
    params = {path: np.asarray(a, np.float64) + 0.1 * rng.normal(size=a.shape) for path, a in params.items()}
    u = rng.normal(size=(2, length, layer.D.shape[0]))
    with jax.enable_x64(True):
        y = jax.jit(lambda params, u: merge(graphdef, params, {})(u))(params, jnp.asarray(u, dtype))
    return params, u, y


@pytest.mark.parametrize("length", [1, 7, 260])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_s4d_equals_its_recurrence(bidirectional, length):
    layer = S4D(3, d_state=4, bidirectional=bidirectional, rngs=nnx.Rngs(0))
    params, u, y = run(layer, jnp.float64, length)
    assert y.dtype == np.float64
    chex.assert_trees_all_close(np.asarray(y), slow_s4d(params, u, bidirectional), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s5_equals_its_recurrence(discretization, bidirectional, length):
    options = {"bidirectional": bidirectional, "discretization": discretization}
    layer = S5(3, d_state=8, blocks=2, **options, rngs=nnx.Rngs(0))
    params, u, y = run(layer, jnp.float64, length)
    assert y.dtype == np.float64
    chex.assert_trees_all_close(np.asarray(y), slow_s5(params, u, **options), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", [S4D, S5])
def test_bfloat16_is_rounded_once(kind):
    """All between input and output is wider."""
    layer = kind(3, d_state=4, rngs=nnx.Rngs(0))
    low = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 3)), jnp.bfloat16)
    run = jax.jit(lambda layer, u: layer(u))
    y, wide = run(layer, low), run(layer, low.astype(jnp.float32))
    assert (y.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    chex.assert_trees_all_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_the_recurrence_are_those_of_its_matrix(reverse):
    rng = np.random.default_rng(2)
    decay, inputs = (0.5, -0.9, 1.0), rng.normal(size=(2, 6, 3, 2))
    angles = np.array([0.3, 2.0, 0.0])
    pair = (np.array(decay) * np.cos(angles), np.array(decay) * np.sin(angles))
    cotangents = rng.normal(size=(2, 2, 6, 3))

    def by_matrix(pair, inputs):
        """Every state as a sum over tokens."""
        a = pair[0] + 1j * pair[1]
        lags = np.arange(6)[:, None] - np.arange(6)
        lags = -lags if reverse else lags
        x = jnp.einsum("ijp,bjp->bip", jnp.where(lags[..., None] < 0, 0, a ** np.maximum(lags, 0)[..., None]), inputs)
        return jnp.real(x), jnp.imag(x)

    with jax.enable_x64(True):
        ours, pull = jax.vjp(lambda pair, u: recur(pair, (u[..., 0], u[..., 1]), reverse), pair, inputs)
        wanted, pull_wanted = jax.vjp(lambda pair, u: by_matrix(pair, u[..., 0] + 1j * u[..., 1]), pair, inputs)
        chex.assert_trees_all_close(ours, wanted, rtol=1e-12, atol=1e-12)
        dy = tuple(jnp.asarray(cotangents))
        chex.assert_trees_all_close(pull(dy), pull_wanted(dy), rtol=1e-11, atol=1e-12)


def test_s5_has_no_complex_numbers_and_a_few_more_operations_for_twice_the_length():
    layer = S5(8, d_state=8, bidirectional=True, rngs=nnx.Rngs(0))

    def program(length):
        return list(equations(jax.make_jaxpr(jax.grad(lambda u: layer(u).sum()))(jnp.zeros((1, length, 8))).jaxpr))

    short, long = program(512), program(1024)
    assert len(long) - len(short) < 150  # a step there and one back, of each direction
    assert not any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for e in long for v in e.outvars)


# Initial values


def test_s4d_starts_as_the_official_one():
    _, params, _ = split(S4D(4096, d_state=4, bidirectional=True, rngs=nnx.Rngs(0)))
    for prefix in ("", "backward_"):
        deciles = np.quantile(params[f"{prefix}log_dt"], np.linspace(0, 1, 11))
        chex.assert_trees_all_close(deciles, np.linspace(math.log(0.001), math.log(0.1), 11), atol=0.15)
        chex.assert_trees_all_close(np.asarray(params[f"{prefix}log_A_real"]), np.full((4096, 2), np.log(0.5), "f"))
        assert np.asarray(params[f"{prefix}C"]).std() == pytest.approx(0.5**0.5, rel=0.02)
    assert np.asarray(params["D"]).std() == pytest.approx(1, rel=0.05)
    assert (params["C"] != params["backward_C"]).all()


def test_s5_starts_as_the_official_one():
    channels, states = 512, 32
    _, params, _ = split(S5(channels, d_state=states, blocks=2, bidirectional=True, rngs=nnx.Rngs(0)))
    assert {path: array.shape for path, array in params.items()} == {
        "B": (16, channels, 2),
        "C": (channels, 32, 2),
        "D": (channels,),
        "Lambda_im": (16,),
        "Lambda_re": (16,),
        "log_step": (16, 1),
    }
    assert (params["Lambda_im"] < 0).all()
    chex.assert_trees_all_equal(params["Lambda_im"][:8], params["Lambda_im"][8:])
    # A unitary basis keeps the size: of B, real, half of it is in the kept half; of C each part is drawn.
    for name, deviation in (("B", (2 * states) ** -0.5), ("C", states**-0.5)):
        assert np.asarray(params[name]).std() == pytest.approx(deviation, rel=0.03), name
    assert -math.log(1000) <= params["log_step"].min() < params["log_step"].max() <= math.log(0.1)


def test_abstract_and_real_layers_are_alike():
    """Initial values are drawn by NumPy in one, and traced in the other."""
    for build in (lambda: S5(6, d_state=4, rngs=nnx.Rngs(0)), lambda: S4D(6, d_state=4, rngs=nnx.Rngs(0))):
        jitted = jax.jit(lambda build=build: split(build())[1])()
        chex.assert_trees_all_close(dict(jitted), dict(split(build()).params), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rngs: S4D(3, d_state=3, rngs=rngs), "d_state=3 is not allowed with S4D: it must be even, 2 or more"),
        (lambda rngs: S4D(3, d_state=4, init="leg", rngs=rngs), "unknown init 'leg', did you mean 'legs'"),
        (lambda rngs: S5(3, d_state=6, blocks=2, rngs=rngs), "d_state=6 is not allowed with S5: it must be a multiple"),
        (lambda rngs: S5(3, d_state=4, discretization="foh", rngs=rngs), "unknown discretization 'foh'"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build(nnx.Rngs(0))


# Devices


@pytest.mark.parametrize(("batch", "rows", "columns"), [(8, ("data", "fsdp"), None), (2, "fsdp", "data")])
def test_s4d_over_devices(batch, rows, columns):
    """Each has its part of the batch, or of the channels, and sends nothing but gradients of parameters."""
    layer = S4D(32, d_state=2, bidirectional=True, rngs=nnx.Rngs(0))
    graphdef, params, _ = split(layer)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    u = np.random.default_rng(3).normal(size=(batch, 5, 32)).astype(np.float32)

    @jax.jit
    def both(params, u):
        y, pull = jax.vjp(lambda params, u: merge(graphdef, params, {})(u), params, u)
        return y, pull(y)

    wanted = both(params, u)
    placed = jax.device_put(u, NamedSharding(mesh, PartitionSpec(rows)))
    with jax.set_mesh(mesh):
        compiled = both.lower(params, placed).compile()
        y, gradients = compiled(params, placed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(rows, None, columns)), 3)
    if columns is None:
        assert "all-gather" not in compiled.as_text()
    scale = jax.tree.map(lambda a: np.abs(a).max(), wanted)
    close = jax.tree.map(lambda a, b, s: np.abs(np.asarray(a) - b).max() / s, (y, gradients), wanted, scale)
    assert max(jax.tree.leaves(close)) < 2e-5
