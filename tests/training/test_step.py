"""The compiled step: the same on every mesh, accumulation, moving average, refusal of what is not finite."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from official_weights import weights_of

from evmamba_jax.arrays import Variables, merge, split
from evmamba_jax.data import device
from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.tasks.classification import Classification
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.config import Config, Duration, MeshConfig, ModelConfig, OptimConfig
from evmamba_jax.training.sparse import Sparse
from evmamba_jax.training.state import init_state
from evmamba_jax.training.step import make_train_step
from evmamba_jax.weights import from_torch

CLASSES = 8
OPTIONS = {"width": 16, "depths": (1, 0, 1, 0), "d_state": 4, "patch_size": 2}


def configured(**changes) -> Config:
    return Config(
        model=ModelConfig("evmamba_t", drop_path_rate=0.2, dtype="float32", options=OPTIONS),
        # Erased, not mixed: tests/data/test_device.py mixes on many devices, and compiling the draws takes longest.
        data=DataConfig(random_erasing=0.25, mixup=0.0, cutmix=0.0, label_smoothing=0.1, image_size=8, crop_pct=1.0),
        # Gradients that are zero but for rounding would be blown up to the rate by a smaller epsilon.
        optim=OptimConfig(eps=1e-4, clip_norm=1.0, ema_decay=0.9),
        seed=3,
        batch_size=16,
        **changes,
    )


def task_for(config) -> Classification:
    return Classification(config, [str(k) for k in range(CLASSES)])


@pytest.fixture(scope="module")
def start():
    """Return the model in training mode, taken apart."""
    model = abstract_model("evmamba_t", drop_path_rate=0.2, num_classes=CLASSES, **OPTIONS)
    from_torch(model, weights_of(model))
    model.train()
    return split(model)


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
            "label": rng.integers(0, CLASSES, 16, dtype=np.int32),
            "corrupt": np.zeros(16, np.int32),
        }


def observing():
    """Return an optimizer that changes nothing and keeps the gradient."""

    def observe(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), {"seen": updates}

    return optax.GradientTransformation(lambda params: {"seen": jax.tree.map(jnp.zeros_like, params)}, observe)


def compiled(config, start, mesh, tx=None, steps_per_epoch=4):
    """Return the step on a mesh and its first state."""
    tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-4))
    make = lambda p, s: init_state(Variables(p, s), tx.init(p), ema=True)  # noqa: E731
    shardings = meshes.state_shardings(mesh, jax.eval_shape(make, *start[1:]))
    lengths = {"steps_per_epoch": steps_per_epoch, "log_every": 2}
    sparse = Sparse(config, tuple(start[1]), start[1], None, in_steps=lambda length: length.steps, total_steps=100)
    step = make_train_step(task_for(config), tx, trained=tuple(start[1]), sparse=sparse, **lengths)
    state = jax.device_put(make(*start[1:]), shardings)
    return jax.jit(step, out_shardings=shardings), state


@pytest.fixture(scope="module")
def on_one_device(start):
    """Return the step compiled for one device; its first state is only read."""
    return compiled(configured(), start, mesh_of(1, 1))


def trained(step, state, mesh):
    losses = []
    for batch in batches(4):
        state = step(state, jax.device_put(batch, meshes.batch_sharding(mesh)))
        losses.append(float(state.last["loss"]))
    return losses, jax.device_get((state.model, state.ema)), state


def mesh_of(data, fsdp):
    return Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), ("data", "fsdp"))


@pytest.fixture(scope="module")
def alone(on_one_device):
    return trained(*on_one_device, mesh_of(1, 1))


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_every_mesh_gives_the_single_device_run(start, alone, shape):
    losses, final, state = trained(*compiled(configured(), start, mesh_of(*shape)), mesh_of(*shape))
    chex.assert_trees_all_close(losses, alone[0], rtol=1e-5)
    chex.assert_trees_all_close(final, alone[1], rtol=1e-4, atol=2e-5)
    kernel = state.model.params["stages.2.blocks.0.pw1.kernel"]  # (64, 256)
    expected = (64, 256 // shape[1])
    assert kernel.addressable_shards[0].data.shape == expected
    moment = state.opt_state[1][0].mu["stages.2.blocks.0.pw1.kernel"]
    assert moment.addressable_shards[0].data.shape == expected


def test_the_run_did_change_the_model(start, alone):
    moved = {name: float(jnp.abs(p - start.params[name]).max()) for name, p in alone[1][0].params.items()}
    assert sum(distance > 1e-3 for distance in moved.values()) > 0.7 * len(moved)
    assert min(moved.values()) > 0


def test_moving_average_follows_parameters_and_statistics(on_one_device):
    step, state = on_one_device
    expected = jax.device_get(state.ema)
    for batch in batches(3):
        state = step(state, batch)
        now = jax.device_get(state.model)
        expected = jax.tree.map(lambda e, n: 0.9 * e + 0.1 * n, expected, now)
    chex.assert_trees_all_close(jax.device_get(state.ema), expected, rtol=1e-5, atol=1e-6)


def test_accumulation_averages_gradients_of_the_rounds(start):
    """Against plain gradients of each half of the batch, taken one after the other."""
    config = configured(accumulation=2)
    step, state = compiled(config, start, mesh_of(1, 1), observing())
    batch = next(batches(1))
    state = step(state, batch)
    kept = state.opt_state["seen"]

    augment_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))
    images, targets = device.train_augment(augment_key, batch["image"], batch["label"], config.data, CLASSES)

    @jax.jit
    def gradient(stats, images, targets, key):
        def loss(params):
            model = merge(start.graphdef, params, stats)
            value = -(targets * jax.nn.log_softmax(model(images, key=key))).sum(1).mean()
            return value, split(model).batch_stats

        return jax.grad(loss, has_aux=True)(start.params)

    stats, total = start.batch_stats, jax.tree.map(jnp.zeros_like, start.params)
    for i in range(2):
        grads, stats = gradient(stats, images[i::2], targets[i::2], jax.random.fold_in(drop_key, i))
        total = jax.tree.map(lambda t, g: t + g / 2, total, grads)
    chex.assert_trees_all_close(kept, total, rtol=2e-3, atol=1e-5)
    chex.assert_trees_all_close(state.model.batch_stats, stats, rtol=1e-4, atol=1e-5)


def test_mesa_learns_from_the_averaged_model_once_it_begins(start):
    config = configured()
    config.optim.mesa, config.optim.mesa_start = 0.7, Duration(steps=1)
    step, state = compiled(config, start, mesh_of(2, 1), observing())
    rng = np.random.default_rng(1)
    averaged = {name: p + 0.05 * rng.normal(size=p.shape).astype(np.float32) for name, p in start.params.items()}
    ema = jax.device_put(Variables(averaged, state.ema.batch_stats), meshes.replicated(mesh_of(2, 1)))
    state = dataclasses.replace(state, ema=ema)
    batch = next(batches(1))
    augment_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(3), 1))
    images, targets = device.train_augment(augment_key, batch["image"], batch["label"], config.data, CLASSES)
    teacher = merge(start.graphdef, averaged, start.batch_stats)
    teacher.eval()
    scores = np.asarray(jax.jit(teacher.__call__)(images), np.float64) / 3
    q = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    @jax.jit
    @jax.value_and_grad
    def expected(params, weight):
        logits = merge(start.graphdef, params, start.batch_stats)(images, key=jax.random.fold_in(drop_key, 0))
        loss = -(targets * jax.nn.log_softmax(logits)).sum(1).mean()
        return loss + weight * 50 * (q * (np.log(q) - jax.nn.log_softmax(logits / 3))).sum(1).mean()

    after = step(dataclasses.replace(state, step=state.step + 1), batch)
    loss, gradient = expected(start.params, 0.7)
    np.testing.assert_allclose(after.last["loss"], loss, rtol=1e-5)
    assert loss > 1.05 * expected(start.params, 0.0)[0]
    chex.assert_trees_all_close(after.opt_state["seen"], gradient, rtol=2e-3, atol=2e-5)

    first = float(step(state, batch).last["loss"])
    state = dataclasses.replace(state, ema=jax.tree.map(jnp.zeros_like, state.ema))
    assert float(step(state, batch).last["loss"]) == first  # before it begins the average does not matter


def test_a_step_that_is_not_finite_changes_nothing(on_one_device):
    step, state = on_one_device
    good, bad, after = batches(3)
    state = step(state, good)
    before = jax.device_get(state)
    bias = state.model.params["head.bias"]
    poisoned = with_bias(state, bias.at[0].set(jnp.inf))
    broken = step(poisoned, bad)
    assert not np.isfinite(broken.last["loss"])
    assert int(broken.step) == 1
    later = step(broken, after)  # nor do the steps after it
    for state in (broken, later):
        state = with_bias(jax.device_get(state), before.model.params["head.bias"])
        assert not np.isfinite(state.last["loss"])
        assert np.isfinite(before.last["loss"])
        chex.assert_trees_all_equal(dataclasses.replace(state, last=before.last), before)


def with_bias(state, bias):
    params = {**state.model.params, "head.bias": bias}
    return dataclasses.replace(state, model=dataclasses.replace(state.model, params=params))


def test_the_window_sums_since_the_last_log_line(on_one_device):
    step, state = on_one_device
    losses = []
    for index, batch in enumerate(batches(5)):
        state = step(state, batch)
        losses.append(float(state.last["loss"]))
        since = losses[index - index % 2 :]
        np.testing.assert_allclose(state.window["loss"], sum(since), rtol=1e-6)
        assert int(state.window["steps"]) == len(since)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (MeshConfig(data=3), {}, "config.mesh is data=3, fsdp=1; their product must be the 8 devices"),
        (MeshConfig(fsdp=3), {}, "config.mesh is data=-1, fsdp=3"),
        (
            MeshConfig(),
            {"batch_size": 20},
            "config.batch_size is 20; it must be a multiple of devices x accumulation = 8 x 1",
        ),
        (MeshConfig(), {"batch_size": 24, "accumulation": 2}, "= 8 x 2 = 16"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        meshes.make_mesh(Config(mesh=mesh, **changes))
    assert dict(meshes.make_mesh(Config(mesh=MeshConfig(fsdp=4), batch_size=16)).shape) == {"data": 2, "fsdp": 4}
