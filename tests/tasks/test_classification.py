"""Classification: what is counted of an evaluation, against loops over single images, and what it refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from official_weights import weights_of

from evmamba_jax.arrays import merge, split
from evmamba_jax.config import Config, ModelConfig
from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError
from evmamba_jax.reports.per_class import Counts
from evmamba_jax.tasks import task_of
from evmamba_jax.tasks.classification import Classification, Gallery, count_by_class
from evmamba_jax.training import mesh as meshes
from evmamba_jax.weights import from_torch


@pytest.fixture(scope="module")
def task():
    options = {"width": 8, "depths": (0, 0, 2, 0), "patch_size": 2}
    config = Config(
        model=ModelConfig("evmamba_t", dtype="float32", options=options), data=DataConfig(image_size=8, crop_pct=1.0)
    )
    return Classification(config, [str(k) for k in range(8)])


def test_answers_are_ranked_and_counted_by_weight(task):
    graphdef, *_ = split(task.model)
    filled = merge(*split(task.model))
    from_torch(filled, weights_of(filled))
    _, params, stats = split(filled)
    rng = np.random.default_rng(0)
    labels, real = rng.integers(0, 8, 16, dtype=np.int32), slice(0, 11)
    batch = {
        "image": rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
        "label": labels,
        "weight": np.float32([1] * 11 + [0] * 5),
    }

    @jax.jit
    def evaluate(params):
        model = merge(graphdef, params, stats)
        return task.evaluate(model, batch, detailed=True)

    sums, answers = evaluate(params)
    images = (batch["image"] / 255.0 - np.array(task.config.data.mean)) / np.array(task.config.data.std)
    logits = np.asarray(jax.jit(filled.__call__)(jnp.float32(images)), np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert float(sums["top1"]) == (order[real, 0] == labels[real]).sum()
    assert float(sums["top5"]) == (order[real, :5] == labels[real, None]).sum()
    assert int(sums["by_class"].confusion.sum()) == 11
    log_z = np.log(np.exp(logits).sum(1))
    expected = (log_z - logits[np.arange(16), labels])[real].sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-4)
    np.testing.assert_array_equal(answers["scores"].argmax(1), order[:, 0])
    np.testing.assert_array_equal(answers["rank"], (order == labels[:, None]).argmax(1))

    broken = {name: params[name] * jnp.nan for name in ("head.kernel", "head.bias")}
    sums, _ = evaluate({**params, **broken})
    assert (float(sums["top1"]), float(sums["top5"])) == (0, 0)  # not every one, though nothing scores higher than NaN


def test_a_process_shows_its_pictures_and_knows_the_answers_to_all():
    """Three examples a process, of four: the second of the first process does not count, nor the last of all."""
    scores = np.eye(5, dtype=np.float32)[[1, 2, 3, 4, 0, 2]] * 0.9
    answers = {"scores": scores, "label": np.array([1, 0, 4, 4, 1, 2]), "weight": np.float32([1, 0, 1, 1, 1, 0])}
    for process, (wrong, right) in enumerate([([1], [0]), ([3], [2])]):
        own, gallery = slice(3 * process, 3 * process + 3), Gallery()
        pictures = np.arange(3 * process, 3 * process + 3, dtype=np.uint8).reshape(3, 1, 1, 1)
        rows = {"image": pictures, **{name: answers[name][own] for name in ("label", "weight")}}
        gallery.add(rows, answers, own)
        found = gallery.answers()
        np.testing.assert_array_equal(found.labels, [1, 4, 4, 1])
        np.testing.assert_array_equal(found.scores, scores[[0, 2, 3, 4]])
        assert ([index for index, _ in found.wrong], [index for index, _ in found.right]) == (wrong, right)
        kept = [0, 2, 3, 4]  # of all examples those that count
        assert [kept.index(int(image[0, 0, 0])) for _, image in found.wrong + found.right] == wrong + right


@pytest.mark.parametrize("label", [-1, 8, 2**40])
def test_a_label_that_is_none_of_the_classes_is_named(task, label):
    with pytest.raises(UserError, match=rf"image seven\.png of imagenet2012 has the label {label}; of its 8 classes"):
        task.reader().decode({"image": b"", "label": label, "id": "seven.png"})


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4)])
def test_the_count_by_class_is_what_a_loop_counts(shape):
    classes, rng = 7, np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "fsdp"))
    expected = Counts(np.zeros((classes, classes), int), np.zeros(classes, int), np.zeros(classes, int))
    label, rank = (rng.integers(0, classes, 80, dtype=np.int32) for _ in range(2))
    weight = rng.integers(0, 2, 80).astype(np.float32)
    found = np.where(rank == 0, label, (label + rank) % classes).astype(np.int32)
    with jax.set_mesh(mesh):
        rows = jax.device_put((label, weight, found, rank), meshes.batch_sharding(mesh))
        counts = jax.jit(count_by_class, static_argnums=4, out_shardings=meshes.replicated(mesh))(*rows, classes)
    for truth, counted, guess, place in zip(label, weight, found, rank, strict=True):
        if counted:
            expected.confusion[truth, guess] += 1
            expected.top1[truth] += place == 0
            expected.top5[truth] += place < 5
    chex.assert_trees_all_equal(jax.device_get(counts), expected, strict=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "clasification"}, "config.task is 'clasification', did you mean 'classification'?; allowed: "),
        ({"confusion": True}, "config.confusion draws what an evaluation counts; add --config.eval_only=True"),
        ({"batch_size": 5}, "config.batch_size is 5; mixup and cutmix pair images, so it must be even"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(UserError) as caught:
        task_of(Config(**changes))
    assert message in str(caught.value)
