"""Scans under a mesh: every device has its part of the batch or of the channels, and sums are over all devices."""

import functools
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

import pallas_kernels
from evmamba_jax import ops
from pallas_kernels import ATROUS, CROSS, Order

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import scan_oracle

NAMES = ("x", "x_weight", "dt_weight", "dt_bias", "A", "D")
ONE = (Order(column_major=True, reverse=True),)  # the cheapest to interpret
PAIR = (Order(), *ONE)  # how arrays lie does not depend on how many orders there are
# How a user of pallas_kernels.scan2d divides its arguments, by their axes.
DIVIDED = {
    "x": PartitionSpec("data", None, None, "model"),
    "x_weight": PartitionSpec(None, "model"),
    "dt_weight": PartitionSpec(None, None, "model"),
    "dt_bias": PartitionSpec(None, "model"),
    "A": PartitionSpec(None, "model"),
    "D": PartitionSpec(None, "model"),
}


def close(actual, wanted):
    scale = jax.tree.map(lambda w: np.abs(w).max(), wanted)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a, s: np.asarray(a, np.float64) / s, actual, scale),
        jax.tree.map(lambda w, s: w / s, wanted, scale),
        atol=1e-5,
        rtol=0,
    )


def images(batch, channels, orders=PAIR, grid=(3, 2)):
    """Return a problem, the gradient of y, and what y and all gradients are."""
    sizes = {"height": grid[0], "width": grid[1], "batch": batch, "channels": channels}
    problem = scan_oracle.make_scan2d(0, **sizes, orders=len(orders), state=1, rank=2)
    dy = np.random.default_rng(1).normal(size=problem["x"].shape)
    wanted = scan_oracle.scan2d(problem, [order.indices(*grid) for order in orders], dy)
    return jax.tree.map(jnp.float32, problem), jnp.float32(dy), wanted


def sequences(batch, groups, share):
    """Return the same for sequences, where the results are y and the last state."""
    problem = scan_oracle.make_scan(
        1, length=5, state=2, groups=groups, share=share, batch=batch, optional=("D", "initial_state")
    )
    rng = np.random.default_rng(2)
    cotangents = rng.normal(size=problem["u"].shape), rng.normal(size=problem["initial_state"].shape)
    y, state, wanted = scan_oracle.scan(problem, softplus_delta=True, dy=cotangents[0], d_state=cotangents[1])
    return jax.tree.map(jnp.float32, problem), jax.tree.map(jnp.float32, cotangents), ((y, state), wanted)


def scan2d(problem, **options):
    return ops.scan2d(*(problem[name] for name in NAMES), **{"orders": PAIR} | options)


def both(function, problem, cotangents):
    """Return the results of a function of the problem, and the gradients of all arrays from those of the results."""

    @jax.jit
    def program(problem, cotangents):
        results, pull = jax.vjp(function, problem)
        return results, pull(cotangents)[0]

    return program(problem, cotangents)


def mesh_of(shape, second="fsdp"):
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", second))


def lowered(function, problem, platform, shape, second="fsdp"):
    """Return what a program is lowered to for accelerators that are not there."""
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    of = {"axis_types": (AxisType.Auto,) * 2, "abstract_device": gpu if platform == "cuda" else None}
    with use_abstract_mesh(AbstractMesh(shape, ("data", second), **of)):
        return jax.jit(function).trace(problem).lower(lowering_platforms=(platform,)).as_text()


def lies_as(array, mesh, *spec):
    return array.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), array.ndim)


@pytest.mark.parametrize(
    ("shape", "batch", "channels", "rows", "columns"),
    [
        ((4, 2), 8, 64, ("data", "fsdp"), None),
        ((4, 2), 4, 8, "data", None),  # too few channels to divide, and below
        ((4, 2), 3, 8, None, None),
        ((2, 4), 2, 32, "data", "fsdp"),
        ((4, 2), 2, 40, "fsdp", "data"),  # ten channels a device
        ((4, 2), 3, 64, None, ("data", "fsdp")),
        ((1, 8), 1, 64, "data", "fsdp"),
    ],
)
def test_images_over_devices(shape, batch, channels, rows, columns):
    problem, dy, wanted = images(batch, channels)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        y, gradients = both(scan2d, problem, dy)
    close((y, gradients), wanted)
    assert lies_as(y, mesh, rows, None, None, columns)
    assert lies_as(gradients["x"], mesh, rows, None, None, columns)
    assert lies_as(gradients["dt_bias"], mesh, None, columns)


@pytest.mark.parametrize(
    ("shape", "batch", "channels"),
    # In the second case, channels of a device lie side by side on the lanes, and time steps are projected outside.
    [((2, 4), 2, 32), ((4, 2), 2, 64)],
)
def test_kernels_over_devices(shape, batch, channels):
    problem, dy, wanted = images(batch, channels, ONE)
    with jax.set_mesh(mesh_of(shape)):
        actual = both(functools.partial(scan2d, orders=ONE, implementation="pallas_interpret"), problem, dy)
    close(actual, wanted)


@pytest.mark.parametrize(
    ("shape", "batch", "groups", "share", "rows", "columns"),
    [
        ((4, 2), 8, 2, 8, ("data", "fsdp"), None),
        ((2, 4), 2, 4, 8, "data", "fsdp"),
        ((4, 2), 2, 1, 32, "fsdp", "data"),  # B and C are whole
        ((2, 4), 3, 2, 32, None, ("data", "fsdp")),  # B and C lie over data, and are whole over fsdp
        ((1, 8), 1, 4, 16, "data", None),  # no device has a whole group
    ],
)
def test_sequences_over_devices(shape, batch, groups, share, rows, columns):
    problem, cotangents, wanted = sequences(batch, groups, share)
    mesh = mesh_of(shape)

    def scan(problem):
        return ops.selective_scan(**problem, delta_softplus=True, return_final_state=True)

    with jax.set_mesh(mesh):
        (y, state), gradients = both(scan, problem, cotangents)
    close(((y, state), gradients), wanted)
    assert lies_as(y, mesh, rows, None, columns)
    assert lies_as(state, mesh, rows, columns)


@pytest.mark.parametrize("batch", [8, 2])
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")])
def test_kernels_lower_on_any_mesh(platform, kernel, shape, batch):
    """Mosaic wants every axis of the mesh in hand, those of one device too."""
    problem, _, _ = images(batch, 64, grid=(2, 2))
    text = lowered(scan2d, problem, platform, shape)
    assert kernel in text
    assert ("all_reduce" in text) == (batch < 8)  # the projections, where channels are divided


def test_without_a_mesh():
    problem, dy, wanted = images(1, 5, CROSS)
    close(both(functools.partial(scan2d, orders=CROSS), problem, dy), wanted)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("form", [ops.convolve, ops._by_toeplitz, ops._by_fourier])
def test_convolutions_equal_a_slow_one(form, length):
    rng = np.random.default_rng(0)
    u, kernel = rng.normal(size=(2, length, 3)), rng.normal(size=(3, 2 * length))
    wanted = np.zeros_like(u)
    for i, j in np.ndindex(length, length):
        wanted[:, i] += u[:, j] * kernel[:, i - j]  # from the end where it is negative
    with jax.enable_x64(True):
        chex.assert_trees_all_close(np.asarray(form(jnp.asarray(u), jnp.asarray(kernel))), wanted, atol=1e-12)


@pytest.mark.parametrize(("length", "transforms"), [(ops.LONGEST_PRODUCT, False), (ops.LONGEST_PRODUCT + 1, True)])
def test_a_tpu_convolves_short_sequences_by_a_product(length, transforms):
    u, kernel = jnp.zeros((2, length, 3)), jnp.zeros((3, 2 * length))
    for platform, wanted in (("tpu", transforms), ("cuda", True), ("cpu", True)):
        text = jax.jit(ops.convolve).trace(u, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert ("fft" in text) == wanted, platform
        assert "gather" not in text


# ------------------------------------------------------------------------------------- pallas_kernels, divided by hand


def by_hand(orders=PAIR, check=True, axis_name="model", mesh=None, **options):
    """Return scan2d as a user divides it, whose gradients come from all devices."""

    def scan(problem):
        return pallas_kernels.scan2d(**problem, orders=orders, axis_name=axis_name, **options)

    return jax.shard_map(scan, mesh=mesh, in_specs=(DIVIDED,), out_specs=DIVIDED["x"], check_vma=check)


@pytest.mark.parametrize(
    ("implementation", "check"),
    [
        *((name, check) for name in (None, "sequential", "associative") for check in (True, False)),
        ("pallas_interpret", False),  # it does not know the check
    ],
)
def test_channels_divided_by_hand(implementation, check):
    """Six of them a device."""
    orders = ONE if implementation == "pallas_interpret" else ATROUS
    problem, dy, wanted = images(2, 24, orders)
    mesh = mesh_of((2, 4), "model")
    close(both(by_hand(orders, check, mesh=mesh, implementation=implementation), problem, dy), wanted)


def test_channels_over_several_axes():
    problem, dy, wanted = images(1, 16)
    specs = {name: PartitionSpec(*(spec and ("data", "model") for spec in DIVIDED[name])) for name in NAMES}
    specs["x"] = PartitionSpec(None, None, None, ("data", "model"))
    scan = functools.partial(pallas_kernels.scan2d, orders=PAIR, axis_name=("data", "model"))
    sharded = jax.shard_map(
        lambda problem: scan(**problem), mesh=mesh_of((2, 4), "model"), in_specs=(specs,), out_specs=specs["x"]
    )
    close(both(sharded, problem, dy), wanted)


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")])
def test_kernels_lower_with_their_axes_checked(platform, kernel):
    problem, dy, _ = images(2, 24, grid=(2, 2))
    text = lowered(jax.grad(lambda problem: (by_hand()(problem) * dy).sum()), problem, platform, (2, 4), "model")
    assert kernel in text
    assert "all_reduce" in text


def test_an_axis_that_is_not_there():
    problem, _, _ = images(2, 24)
    with pytest.raises(ValueError, match="scan2d") as caught:
        by_hand(axis_name=("model", "fsdp"), mesh=mesh_of((2, 4), "model"))(problem)
    assert str(caught.value) == (
        "scan2d: axis_name='fsdp' must be an axis of the jax.shard_map around the call, one of 'data', 'model'"
    )
