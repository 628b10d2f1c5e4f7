"""Scans under a mesh: every device has its part of the batch, and gradients of parameters are summed over devices."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax import ops
from pallas_kernels import CROSS

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import scan_oracle

NAMES = ("x", "x_weight", "dt_weight", "dt_bias", "A", "D")


def close(actual, wanted):
    scale = jax.tree.map(lambda w: np.abs(w).max(), wanted)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a, s: np.asarray(a, np.float64) / s, actual, scale),
        jax.tree.map(lambda w, s: w / s, wanted, scale),
        atol=1e-5,
        rtol=0,
    )


# 8 images lie over both axes, 4 over the first alone, 3 over none.
@pytest.mark.parametrize(("batch", "over"), [(8, ("data", "fsdp")), (4, "data"), (3, None)])
def test_images_over_devices(batch, over):
    problem = scan_oracle.make_scan2d(0, height=3, width=4, orders=4, state=2, rank=2, batch=batch, channels=8)
    _, wanted = scan_oracle.scan2d(problem, [order.indices(3, 4) for order in CROSS], np.ones_like(problem["x"]))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))

    def loss(problem):
        return ops.scan2d(*(problem[name] for name in NAMES), orders=CROSS).sum()

    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(over))
        placed = {n: jax.device_put(jnp.float32(a), rows if n == "x" else None) for n, a in problem.items()}
        gradients = jax.jit(jax.grad(loss))(placed)
    close(jax.device_get(gradients), wanted)
    assert gradients["x"].sharding.is_equivalent_to(rows, 4)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_kernels_lower_for_a_tpu_on_any_mesh(shape):
    """Mosaic wants every axis of the mesh in hand, those of one device too."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
    problem = scan_oracle.make_scan2d(0, height=2, width=2, orders=4, state=1, rank=1, batch=8, channels=8)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda p: ops.scan2d(*(p[name] for name in NAMES), orders=CROSS))
        traced = program.trace(jax.tree.map(jnp.float32, problem))
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_sequences_over_devices():
    problem = scan_oracle.make_scan(1, length=5, state=2, groups=2, batch=8, optional=("D", "initial_state"))
    wanted, final = scan_oracle.scan(problem, softplus_delta=True)
    arrays = jax.tree.map(jnp.float32, problem)
    with jax.set_mesh(Mesh(np.array(jax.devices()), ("data",))):
        y, state = jax.jit(
            lambda p: ops.selective_scan(**p, delta_softplus=True, return_final_state=True, implementation=None)
        )(arrays)
    close((y, state), (wanted, final))


def test_without_a_mesh():
    problem = scan_oracle.make_scan2d(0, height=3, width=2, orders=4, state=1, rank=1, batch=1)
    wanted, _ = scan_oracle.scan2d(problem, [order.indices(3, 2) for order in CROSS], np.ones_like(problem["x"]))
    close(ops.scan2d(*(jnp.float32(problem[name]) for name in NAMES), orders=CROSS), wanted)
