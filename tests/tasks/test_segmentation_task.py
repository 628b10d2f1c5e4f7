"""A class for every pixel: figures against scikit-learn, and a run of two steps with all that it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scene_runs
from flax import nnx
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from configs import digits_segmentation
from evmamba_jax.data.dense_config import SegmentationData
from evmamba_jax.data.opencv import resize_bilinear
from evmamba_jax.errors import UserError
from evmamba_jax.segmentation import multi_scale, to_original, whole
from evmamba_jax.tasks import segmentation, task_of


def small():
    config = scene_runs.small(digits_segmentation.get_config())
    config.segmenter.width = config.segmenter.aux_width = 8
    return config


def test_figures_are_sklearns():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (2, 300))
    truth[truth == 3] = 1  # the last class is found, and nowhere
    counts = segmentation.Counts(
        *(
            np.array([np.sum(where & (of == k)) for k in range(5)])
            for where, of in ((truth == found, truth), (True, truth), (True, found))
        )
    )
    sums = {"counts": counts, "loss": 3.0, "examples": 2.0}
    figures = segmentation.Segmentation.metrics(None, sums, None)
    there = [0, 1, 2, 3]
    wanted = jaccard_score(truth, found, labels=there, average=None, zero_division=0)
    assert figures["mIoU"] == pytest.approx(100 * wanted.mean())  # class 4 is neither there nor found
    assert figures["mAcc"] == pytest.approx(100 * recall_score(truth, found, labels=[0, 1, 2], average="macro"))
    assert figures["aAcc"] == pytest.approx(100 * accuracy_score(truth, found))


def test_the_worst_images_are_kept():
    truth = np.zeros((5, 2, 2), np.uint8)
    truth[4] = 255  # nothing counts
    found = truth.copy()
    found[1, 0, 0], found[3] = 1, 1
    size = np.full((5, 2), 2)
    rows = {"image": np.zeros((5, 2, 2, 3), np.uint8), "label_map": truth, "weight": np.ones(5)}
    rows |= {"size": size, "original": size}
    worst = segmentation.Worst()
    worst.add(rows, np.concatenate([found, found]), slice(5, 10))
    assert [one[:2] for one in worst.kept] == [(0.0, 3), (0.75, 1), (1.0, 0), (1.0, 2), (1.0, 4)]


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("data", "mixup", 0.2, "data.mixup is for images of one class"),
        ("data", "image_size", 64, "128 pixels a side"),
        ("segmenter", "width", 0, "segmenter.width=0"),
    ],
)
def test_mistakes_get_one_line(part, field, value, message):
    config = small()
    setattr(getattr(config, part), field, value)
    with pytest.raises(UserError, match=message):
        task_of(config)


def colours_as_logits(images):
    """Four logits of each 4x4 pixels, the last of which depend on their neighbours to the right."""
    means = nnx.avg_pool(images, (4, 4), (4, 4), padding="SAME")
    return jnp.concatenate([means, jnp.roll(means, -1, 2)[..., :1]], -1)


@pytest.mark.parametrize("padding", ["exact", "buckets"])
@pytest.mark.parametrize("scales", [(), (0.5, 1.25)])
def test_an_evaluation_is_that_of_each_image_alone(padding, scales):
    """Logits of the resized image, or mean probabilities over scales and mirror images, at the size it is stored in."""
    data = SegmentationData(image_size=48, scale=(160, 40), eval_padding=padding, test_scales=scales)
    task = object.__new__(segmentation.Segmentation)
    task.config = segmentation.SegmentationConfig(data=data)
    reader, rng = task.reader(), np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((8, 6, 1))).astype(np.uint8)
    labels = rng.integers(0, 4, image.shape[:2]).astype(np.uint8)
    labels[:9] = 255
    blank = reader.blank(training=False, shape=reader.eval_shape(labels.shape))
    batch = jax.tree.map(lambda *rows: jnp.stack(rows), reader.evaluate((image, labels)), blank)
    sums, found = task.evaluate(colours_as_logits, {**batch, "weight": jnp.array([1.0, 0.0])}, detailed=False)

    def view(height, width):
        pixels = resize_bilinear(image, height, width)[None] / 255.0
        return jnp.asarray((pixels - data.mean) / data.std, jnp.float32)

    logits_of = functools.partial(whole, colours_as_logits)
    if scales:
        views = [view(int(96 * f + 0.5), int(96 * f + 0.5)) for f in scales]
        wanted = jnp.log(multi_scale(logits_of, views, labels.shape))[0]
    else:
        wanted = to_original(logits_of(view(40, 40)), labels.shape)[0]
    inner = slice(None) if padding == "exact" else slice(26, 70)  # neighbours of padding see it
    right = (found[0, : labels.shape[0], : labels.shape[1]] == wanted.argmax(-1))[inner, inner]
    assert right.mean() > 0.999
    if padding == "exact":
        counted = labels != 255
        assert int(sums["counts"].labelled.sum()) == counted.sum()
        assert int(sums["counts"].right.sum()) == ((wanted.argmax(-1) == labels) & counted).sum()
        loss = -jax.nn.log_softmax(wanted)[np.arange(96)[:, None], np.arange(96), np.minimum(labels, 3)]
        np.testing.assert_allclose(sums["loss"], loss[counted].mean(), rtol=1e-4)
