"""The train state and its checkpoints, which keep the layout that they have had from the beginning."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from evmamba_jax.arrays import Variables
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.training.mesh import state_shardings
from evmamba_jax.training.state import TrainState, init_state

SHAPES = {"a.kernel": (64, 128), "a.bias": (128,)}


def filled(start: int, shapes=SHAPES) -> dict[str, np.ndarray]:
    return {name: start + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def old():
    """Return a state as plain dictionaries, which is how it was saved before there was a class for it."""
    moments = optax.adam(1e-3).init(filled(0))
    return {
        "model": {"params": filled(0), "batch_stats": {"a.mean": np.ones(128, np.float32)}},
        "ema": {"params": filled(1), "batch_stats": {"a.mean": np.zeros(128, np.float32)}},
        "train": {
            "step": np.int32(7),
            "opt_state": jax.tree.map(lambda x: np.asarray(x) + 3, moments),
            "window": {name: np.float32(i) for i, name in enumerate(("loss", "grad_norm", "corrupt", "steps"))},
            "last": {"loss": np.float32(0.5), "grad_norm": np.float32(2)},
        },
    }


def abstract(*, extra=None, mesh=None):
    model = Variables(filled(0), {"a.mean": np.ones(128, np.float32)})
    shapes = jax.eval_shape(lambda: init_state(model, optax.adam(1e-3).init(model.params), ema=True, extra=extra))
    mesh = mesh or Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def test_a_checkpoint_saved_as_dictionaries_becomes_a_state(old, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, jax.tree.map(jnp.asarray, old), meta={})
    with Checkpoints(tmp_path) as checkpoints:
        step, items, _ = checkpoints.restore(abstract().items())
    state = TrainState.of_items(items)
    assert step == int(state.step) == 7
    assert state.model.params["a.kernel"].sharding.spec == PartitionSpec(None, "fsdp")
    chex.assert_trees_all_equal(state.items(), old)


def test_a_state_is_saved_under_the_same_names(old, tmp_path):
    """File for file: what the two ways of saving leave behind."""
    state = TrainState.of_items(jax.tree.map(jnp.asarray, old))
    for name, items in (("old", jax.tree.map(jnp.asarray, old)), ("new", state.items())):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(7, items, meta={})
    names = [
        {path.relative_to(tmp_path / name / "7").as_posix() for path in (tmp_path / name / "7").rglob("_METADATA")}
        for name in ("old", "new")
    ]
    assert names[0] == names[1] == {f"{item}/_METADATA" for item in ("model", "ema", "train")}
    for item in ("model", "ema", "train"):
        trees = [json.loads((tmp_path / name / "7" / item / "_METADATA").read_text()) for name in ("old", "new")]
        assert trees[0]["tree_metadata"] == trees[1]["tree_metadata"]


def test_further_items_are_placed_saved_and_restored(old, tmp_path):
    """Masks, for instance: bool, sharded as the parameters they belong to, in a folder of their own."""
    masks = {"masks": {"a.kernel": filled(0)["a.kernel"] % 3 == 0}}
    wanted = abstract(extra=masks)
    assert wanted.extra["masks"]["a.kernel"].sharding == wanted.model.params["a.kernel"].sharding
    state = dataclasses.replace(TrainState.of_items(jax.tree.map(jnp.asarray, old)), extra=jax.device_put(masks))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state.items(), meta={})
        _, items, _ = checkpoints.restore(wanted.items())
    assert (tmp_path / "7" / "masks").is_dir()
    restored = TrainState.of_items(items)
    assert restored.extra["masks"]["a.kernel"].sharding.spec == PartitionSpec(None, "fsdp")
    chex.assert_trees_all_equal(restored.items(), state.items())
