"""Which implementation runs where, and the kernels wherever people put a scan; for numbers, in Pallas's interpreter."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_selective_scan import ALL, close

import pallas_kernels
from evmamba_jax import ops
from pallas_kernels import ATROUS, CROSS, Chain, Order, scan2d, selective_scan

LEAVES_ITS_LATTICE = (Chain((Order(step=(1, 2)), Order(origin=(0, 1), step=(1, 2)))),)
IMAGE = (Order(column_major=True, reverse=True),)  # the cheapest to interpret
PARAMETERS = ("x_weight", "dt_weight", "dt_bias", "A", "D")
SHARED = ("A", "D", "delta_bias")


def images(orders=IMAGE, dtype=np.float32, grid=(3, 2), batch=8):
    """Return a problem, weights of a loss (the sum of y times them), and the oracle's gradients of that loss."""
    sizes = {"height": grid[0], "width": grid[1], "batch": batch, "channels": 8}
    problem = scan_oracle.make_scan2d(0, **sizes, orders=len(orders), state=1, rank=2)
    weights = np.random.default_rng(1).normal(size=problem["x"].shape)
    _, wanted = scan_oracle.scan2d(problem, [order.indices(*grid) for order in orders], weights)
    return {name: a.astype(dtype) for name, a in problem.items()}, weights.astype(dtype), wanted


def sequences(groups=1, share=8):
    """Return the same for sequences."""
    problem = scan_oracle.make_scan(0, length=5, state=1, groups=groups, share=share, batch=8, optional=ALL)
    weights = np.random.default_rng(1).normal(size=problem["u"].shape)
    wanted = scan_oracle.scan(problem, softplus_delta=True, dy=weights)[2]
    return {name: np.float32(a) for name, a in problem.items()}, np.float32(weights), wanted


def image_loss(problem, weights, implementation="pallas_interpret", orders=IMAGE):
    return (scan2d(**problem, orders=orders, implementation=implementation) * weights).sum()


def sequence_loss(problem, weights, implementation="pallas_interpret"):
    return (selective_scan(**problem, delta_softplus=True, implementation=implementation) * weights).sum()


def gradient(loss, problem, *rest):
    return jax.device_get(jax.jit(jax.grad(loss))(problem, *rest))


def lowered(function, *arguments, platform="tpu"):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("implementation", "orders", "dtype", "reason"),
    [
        ("pallas", IMAGE, np.float32, "there are none for this platform, only for "),
        ("pallas_interpret", IMAGE, np.float64, "they take float32 and bfloat16, not float64"),
        ("pallas_interpret", LEAVES_ITS_LATTICE, np.float32, "they cannot walk a chain that leaves its sub-lattice"),
    ],
)
@pytest.mark.parametrize("direction", [lambda f: f, jax.grad], ids=["forward", "backward"])
def test_a_name_that_cannot_run_says_why(implementation, orders, dtype, reason, direction):
    with jax.enable_x64(dtype == np.float64):
        problem, weights, _ = images(orders, dtype)
        program = direction(functools.partial(image_loss, implementation=implementation, orders=orders))
        with pytest.raises(ValueError, match="kernels, but") as caught:
            jax.jit(program).lower(problem, weights)
    message = str(caught.value)
    assert re.match(r"scan2d, called at \S*test_dispatch.py:\d+:\d+ \(image_loss\): ", message)
    assert f"implementation={implementation!r} asks for kernels, but {reason}" in message
    assert message.endswith("None takes a portable implementation there, as do 'sequential' and 'associative'")
    assert "\n" not in message


def test_a_sequence_that_cannot_run_says_why():
    problem, weights, _ = sequences()
    with jax.enable_x64(True):
        narrow = problem | {"A": np.float64(problem["A"])}
        program = jax.jit(sequence_loss)
        with pytest.raises(ValueError, match="they do not take float64") as caught:
            program.lower(narrow, weights)
    message = str(caught.value)
    assert re.match(r"selective_scan, called at \S*test_dispatch.py:\d+:\d+ \(sequence_loss\): ", message)
    assert "implementation='pallas_interpret' asks for kernels, but they do not take float64" in message


@pytest.mark.parametrize(
    ("orders", "dtype"), [(IMAGE, np.float64), (LEAVES_ITS_LATTICE, np.float32)], ids=["float64", "chain"]
)
def test_none_falls_back(orders, dtype):
    """To a loop over tokens on a TPU, and to the same numbers everywhere."""
    with jax.enable_x64(dtype == np.float64):
        problem, weights, wanted = images(orders, dtype, grid=(3, 4))
        loss = functools.partial(image_loss, implementation=None, orders=orders)
        text = lowered(jax.grad(loss), problem, weights)
        close(gradient(loss, problem, weights), wanted, 1e-5 if dtype == np.float32 else 1e-12)
    assert "stablehlo.while" in text
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize("loss", [image_loss, sequence_loss])
def test_none_is_portable_on_a_cpu(loss):
    problem, weights, wanted = images() if loss is image_loss else sequences()
    portable = functools.partial(loss, implementation=None)
    close(gradient(portable, problem, weights), wanted, 1e-5)
    assert "custom_call" not in lowered(jax.grad(portable), problem, weights, platform="cpu")


# ------------------------------------------------------------------------------------------------- on other platforms


@pytest.mark.parametrize("orders", [CROSS, ATROUS], ids=["cross", "atrous"])
def test_images_lower_to_kernels_for_a_tpu(orders):
    """On a host that has none; tokens are walked in the kernels and nowhere else, and no pixel moves by an index."""
    problem, weights, _ = images(orders, grid=(8, 8))
    forward = functools.partial(image_loss, implementation=None, orders=orders)
    for program in (forward, jax.grad(forward)):
        text = lowered(program, problem, weights)
        assert "tpu_custom_call" in text
        assert "stablehlo.while" not in text
        indexed = re.findall(r'"stablehlo.(?:gather|scatter)".*?: \(tensor<([\dx]*)x\w+>', text, re.DOTALL)
        sizes = [math.prod(map(int, shape.split("x"))) for shape in indexed]
        assert max(sizes, default=0) < problem["x"].size / 2  # parameters only


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_sequences_lower_to_kernels_for_a_tpu(implementation, reverse):
    problem, weights, _ = sequences()

    def forward(problem):
        options = {"delta_softplus": True, "reverse": reverse, "implementation": implementation}
        y, state = selective_scan(**problem, **options, return_final_state=True)
        return (y * weights).sum() + state.sum()

    for program in (forward, jax.grad(forward)):
        text = lowered(program, problem)
        assert "tpu_custom_call" in text
        assert "stablehlo.while" not in text


def image_scan(scans, problem):
    return scans.scan2d(problem["x"], *(problem[name] for name in PARAMETERS), orders=IMAGE)


def sequence_scan(scans, problem):
    return scans.selective_scan(**problem, delta_softplus=True)


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("scans", [pallas_kernels, ops])
@pytest.mark.parametrize(("scan", "make"), [(image_scan, images), (sequence_scan, sequences)])
def test_the_source_of_a_scan_is_its_callers_line(scan, make, scans, platform):
    """In both passes, of kernels and of portable loops, and through the division over a mesh."""
    problem, weights, _ = make()

    def loss(problem):
        return (scan(scans, problem) * weights).sum()

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh) if scans is ops else contextlib.nullcontext():
        program = jax.jit(jax.grad(loss)).trace(problem).lower(lowering_platforms=(platform,))
    places = set(re.findall(r'"(/[^"]*\.py)":(\d+)', program.as_text(debug_info=True)))
    line = scan.__code__.co_firstlineno + 1
    assert (__file__, str(line)) in places
    assert not [file for file, _ in places if "/pallas_kernels/" in file or "/evmamba_jax/" in file]


@pytest.mark.parametrize("name", ["sequential", "associative"])
def test_a_portable_name_is_portable_on_a_tpu(name):
    problem, weights, _ = images()
    assert "tpu_custom_call" not in lowered(
        jax.grad(functools.partial(image_loss, implementation=name)), problem, weights
    )


def test_equal_layers_share_their_kernels():
    problem, _, _ = images()
    parameters = {name: problem[name] for name in PARAMETERS}

    def kernels(layers):
        def loss(x, parameters):
            for _ in range(layers):
                x = scan2d(x, **parameters, orders=IMAGE)
            return (x * x).sum()

        return lowered(jax.grad(loss, argnums=(0, 1)), problem["x"], parameters).count("tpu_custom_call")

    assert kernels(3) == kernels(1) == 2  # forward and backward


def test_inside_shard_map_it_lowers_for_a_tpu():
    """With JAX's check of what varies over the mesh, which the results of kernels must declare."""
    problem, weights, _ = images()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {name: P() if name in PARAMETERS else P("data") for name in problem}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("data")), out_specs=P())
    def total(problem, weights):
        return lax.psum(image_loss(problem, weights, None), "data")

    text = lowered(jax.grad(total), problem, weights)
    assert "tpu_custom_call" in text
    assert "all_reduce" in text  # the gradients of the parameters


# --------------------------------------------------------------------------------------------- under transformations


def test_without_jit():
    problem, weights, wanted = images(batch=2)
    close(jax.grad(image_loss)(problem, weights), wanted, 1e-5)


@pytest.mark.parametrize("loss", [image_loss, sequence_loss])
def test_checkpoint(loss):
    problem, weights, wanted = images() if loss is image_loss else sequences()
    close(gradient(jax.checkpoint(loss), problem, weights), wanted, 1e-5)


def test_vmap_over_images():
    problem, weights, wanted = images()
    axes = {name: None if name in PARAMETERS else 0 for name in problem}

    def total(problem, weights):
        split = problem | {"x": problem["x"].reshape(4, 2, *problem["x"].shape[1:])}
        return jax.vmap(image_loss, in_axes=(axes, 0))(split, weights.reshape(4, 2, *weights.shape[1:])).sum()

    close(gradient(total, problem, weights), wanted, 1e-5)


def test_vmap_over_sequences_and_their_parameters():
    """Two layers at once: every array has the axis, and not the first one of each."""
    problem, weights, wanted = sequences()
    other, other_weights, other_wanted = sequences(groups=1)
    other = {name: a[::-1] if name in SHARED else a for name, a in other.items()}
    other_wanted = scan_oracle.scan(other, softplus_delta=True, dy=other_weights)[2]
    both = {name: np.stack([problem[name], other[name]], 1) for name in problem}
    both_weights = np.stack([weights, other_weights])

    def total(problem, weights):
        return jax.vmap(sequence_loss, in_axes=(1, 0))(problem, weights).sum()

    both_wanted = {name: np.stack([wanted[name], other_wanted[name]], 1) for name in problem}
    close(gradient(total, both, both_weights), both_wanted, 1e-5)


def test_gradients_summed_over_microbatches():
    problem, weights, wanted = images()
    parameters = {name: problem[name] for name in PARAMETERS}

    @jax.jit
    def accumulated(parameters, x, weights):
        def one(total, part):
            x, weights = part
            gradients = jax.grad(lambda p: image_loss({"x": x} | p, weights))(parameters)
            return jax.tree.map(jnp.add, total, gradients), None

        parts = (a.reshape(4, 2, *a.shape[1:]) for a in (x, weights))
        return lax.scan(one, jax.tree.map(jnp.zeros_like, parameters), tuple(parts))[0]

    close(accumulated(parameters, problem["x"], weights), {name: wanted[name] for name in PARAMETERS}, 1e-5)


# The interpreter does not know JAX's check of what varies over the mesh.
@pytest.mark.parametrize(("implementation", "check"), [("pallas_interpret", False), (None, True), (None, False)])
def test_batch_over_devices(implementation, check):
    problem, weights, wanted = images()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {name: P() if name in PARAMETERS else P("data") for name in problem}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=check)
    def each(problem, weights):
        return image_loss(problem, weights, implementation)[None]

    close(gradient(lambda *arguments: each(*arguments).sum(), problem, weights), wanted, 1e-5)


@pytest.mark.parametrize(("implementation", "check"), [("pallas_interpret", False), (None, True), (None, False)])
def test_channels_over_devices(implementation, check):
    """B and C are shared by the channels: their gradients come from all devices."""
    problem, weights, wanted = sequences(groups=1, share=16)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    last, first = P(None, None, "model"), P("model")
    specs = {"u": last, "delta": last, "A": first, "B": P(), "C": P(), "D": first, "delta_bias": first}
    specs["initial_state"] = P(None, "model")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, last), out_specs=P("model"), check_vma=check)
    def each(problem, weights):
        return sequence_loss(problem, weights, implementation)[None]

    close(gradient(lambda *arguments: each(*arguments).sum(), problem, weights), wanted, 1e-5)
