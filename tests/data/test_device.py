"""Device transforms against slow NumPy versions of timm's rules."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.device import mixup_cutmix, normalize, one_hot_smooth, partners, train_augment
from evmamba_jax.data.device import random_erasing as eager_random_erasing

random_erasing = jax.jit(eager_random_erasing, static_argnums=2)  # op by op it takes seconds


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return top, left, height, width of the True pixels, after checking that they fill a rectangle."""
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert mask.sum() == box[2] * box[3]
    return tuple(map(int, box))


def test_normalize():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    got = normalize(jnp.asarray(images), mean, std)
    assert got.dtype == jnp.float32
    chex.assert_trees_all_close(got, expected.astype(np.float32), atol=1e-6)
    assert normalize(jnp.asarray(images), mean, std, jnp.bfloat16).dtype == jnp.bfloat16


def test_one_hot_smooth():
    got = one_hot_smooth(jnp.array([1, 0]), 4, 0.1)
    chex.assert_trees_all_close(
        got, np.float32([[0.025, 0.925, 0.025, 0.025], [0.925, 0.025, 0.025, 0.025]]), atol=1e-7
    )


def slow_erasing_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int] | None:
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return None


def test_random_erasing_boxes():
    """Boxes, their rate and their places are distributed as in a slow simulation."""
    height, width, count = 48, 32, 3000
    images = jnp.full((count, height, width, 1), 1000.0)
    erased = np.asarray(random_erasing(jax.random.key(0), images, 1.0))[..., 0] != 1000
    ours = [box for mask in erased if (box := box_of(mask))]
    rng = np.random.default_rng(0)
    slow = [box for _ in range(count) if (box := slow_erasing_box(rng, height, width))]
    assert abs(len(ours) - len(slow)) < 20  # one in many thousands finds no box in ten tries
    for what in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(what(np.array(ours)), what(np.array(slow))).pvalue > 1e-3


def test_random_erasing_fills_with_standard_noise():
    images = jnp.full((400, 24, 24, 3), 1000.0)
    out = np.asarray(random_erasing(jax.random.key(1), images, 0.25))
    changed = out != 1000
    assert 0.18 < changed.any((1, 2, 3)).mean() < 0.32
    assert (changed.all(-1) == changed.any(-1)).all()  # all channels of a pixel
    noise = out[changed]
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert stats.kstest(noise.astype(np.float64), "norm").pvalue > 1e-3
    assert 3.5 < np.abs(noise).max() < 4.86
    pixels = out[changed.all(-1)]
    assert abs(np.corrcoef(pixels.T)[0, 1]) < 0.03  # a draw for each channel
    # The halves of an image come of the same bits.
    upper, lower = (half[changed[:, :12] & changed[:, 12:]] for half in (out[:, :12], out[:, 12:]))
    for power in (1, 2, 3):
        assert abs(np.corrcoef(upper**power, lower**power)[0, 1]) < 0.04
    assert abs(np.corrcoef(upper, lower**2)[0, 1]) < 0.04
    assert abs(np.corrcoef(upper**2, lower)[0, 1]) < 0.04


def test_random_erasing_of_an_odd_height():
    images = jnp.full((200, 23, 24, 1), 1000.0)
    out = np.asarray(random_erasing(jax.random.key(2), images, 1.0))
    for rows in (slice(0, 12), slice(12, 23)):
        noise = out[:, rows][out[:, rows] != 1000]
        assert stats.kstest(noise.astype(np.float64), "norm").pvalue > 1e-3


def test_random_erasing_off_and_impossible():
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    chex.assert_trees_all_equal(random_erasing(jax.random.key(0), images, 0.0), images)
    tiny = jnp.ones((64, 1, 1, 3))  # no box is smaller than one pixel
    chex.assert_trees_all_equal(random_erasing(jax.random.key(0), tiny, 1.0), tiny)


BATCH = 6
LABELS = jnp.arange(BATCH)
PARTNERS = [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(2, [1, 0]), (6, PARTNERS), (16, [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11])],
)
def test_partners(batch, expected):
    images = jnp.arange(batch * 3).reshape(batch, 3)
    chex.assert_trees_all_equal(partners(images), images[jnp.array(expected)])


def draw(number: int, height: int = 32, width: int = 24, **settings):
    """Mix a batch of constant images, image i having the value i, under many keys; labels are 0 to B - 1."""
    images = jnp.broadcast_to(jnp.arange(BATCH, dtype=jnp.float32)[:, None, None, None], (BATCH, height, width, 1))
    keys = jax.random.split(jax.random.key(7), number)
    mixed, targets = jax.jit(jax.vmap(lambda key: mixup_cutmix(key, images, LABELS, BATCH, **settings)))(keys)
    chex.assert_shape(mixed, (number, BATCH, height, width, 1))
    chex.assert_shape(targets, (number, BATCH, BATCH))
    return np.asarray(mixed)[..., 0], np.asarray(targets)


def test_mixup_mixes_images_as_targets():
    mixed, targets = draw(3000, height=2, width=2, mixup=0.2, cutmix=0.0)
    lam = targets[:, 0, 0]
    for i in range(BATCH):
        partner = PARTNERS[i]
        chex.assert_trees_all_close(targets[:, i, i], lam, atol=1e-6)
        chex.assert_trees_all_close(targets[:, i, partner], 1 - lam, atol=1e-6)
        chex.assert_trees_all_close(mixed[:, i, 0, 0], lam * i + (1 - lam) * partner, atol=1e-5)
    assert (np.abs(mixed - mixed[:, :, :1, :1]) < 1e-6).all()
    # Kolmogorov-Smirnov's test cannot see float32's rounding of values next to 0 and 1.
    assert stats.kstest(lam.astype(np.float64), stats.beta(0.2, 0.2).cdf).pvalue > 1e-3


def slow_cutmix_lambda(rng: np.random.Generator, alpha: float, height: int, width: int) -> float:
    ratio = math.sqrt(1 - rng.beta(alpha, alpha))
    h, w = int(height * ratio), int(width * ratio)
    row, column = rng.integers(height), rng.integers(width)
    y1, y2 = np.clip([row - h // 2, row + h // 2], 0, height)
    x1, x2 = np.clip([column - w // 2, column + w // 2], 0, width)
    return 1 - (y2 - y1) * (x2 - x1) / (height * width)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_cutmix_pastes_one_box_of_the_partner(alpha):
    height, width = 32, 24
    mixed, targets = draw(2000, height, width, mixup=0.0, cutmix=alpha)
    pasted = mixed[:, 0] == PARTNERS[0]
    for i in range(BATCH):  # the same box in every image, the partner's pixels in it, its own outside
        assert (mixed[:, i] == np.where(pasted, PARTNERS[i], i)).all()
    boxes = [box for mask in pasted if (box := box_of(mask))]
    assert len(boxes) > 1500
    lam = 1 - pasted.mean((1, 2))
    chex.assert_trees_all_close(targets[:, 0, 0], lam.astype(np.float32), atol=1e-6)
    chex.assert_trees_all_close(targets[:, 0, PARTNERS[0]], (1 - lam).astype(np.float32), atol=1e-6)
    rng = np.random.default_rng(0)
    slow = [slow_cutmix_lambda(rng, alpha, height, width) for _ in range(4000)]
    assert stats.ks_2samp(lam, slow).pvalue > 1e-3


def test_both_are_chosen_and_switched_off_with_their_probabilities():
    mixed, targets = draw(3000, 8, 8, mixup=0.5, cutmix=0.5, mix_prob=0.8, switch_prob=0.3)
    own = np.arange(BATCH)[None, :, None, None]
    is_box = ((mixed == own) | (mixed == own[:, PARTNERS])).all(
        (1, 2, 3)
    )  # nothing between the two values: cutmix or none
    untouched = (mixed == own).all((1, 2, 3))
    assert (targets[untouched].argmax(-1) == np.arange(BATCH)).all()
    mixup_share = 1 - is_box.mean()
    assert 0.8 * 0.7 - 0.1 < mixup_share < 0.8 * 0.7 + 0.03  # lambdas that round to 0 or 1 look like no mixup
    assert 0.2 - 0.03 < untouched.mean() < 0.2 + 0.15  # with cutmix's empty boxes and lambda = 1


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_targets_are_smoothed_distributions(mixup, cutmix):
    _, targets = draw(50, 4, 4, mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    chex.assert_trees_all_close(targets.sum(-1), np.ones((50, BATCH), np.float32), atol=1e-5)
    off = np.float32(0.1 / BATCH)
    for i in range(BATCH):
        others = [k for k in range(BATCH) if k not in (i, PARTNERS[i])]
        chex.assert_trees_all_close(targets[:, i, others], np.full((50, len(others)), off), atol=1e-6)
    assert targets.max() <= 1 - 0.1 + off + 1e-6


def test_every_image_draws_for_itself_in_elem_mode():
    """Rate, kind and lambda of each image as in a slow simulation of timm's; no image knows of another's draws."""
    height, width = 16, 12
    settings = {"mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.8, "switch_prob": 0.3, "mixup_mode": "elem"}
    mixed, targets = draw(1500, height, width, **settings)
    lam = targets[:, np.arange(BATCH), np.arange(BATCH)]
    chex.assert_trees_all_close(targets[:, np.arange(BATCH), PARTNERS], 1 - lam, atol=1e-6)
    own, other = np.arange(BATCH)[None, :, None, None], np.array(PARTNERS)[None, :, None, None]
    kept = (mixed - other) / (own - other)  # the share of each pixel that is the image's own
    chex.assert_trees_all_close(kept.mean((2, 3)), lam, atol=1e-5)
    rng = np.random.default_rng(0)
    slow = np.ones(20_000)
    for i in range(len(slow)):
        if rng.random() < 0.8:
            slow[i] = slow_cutmix_lambda(rng, 1.0, height, width) if rng.random() < 0.3 else rng.beta(0.4, 0.4)
    for i in range(BATCH):
        # Values next to 1 are told apart by float32's rounding only.
        assert stats.ks_2samp(lam[:, i].round(4), slow.round(4)).pvalue > 1e-3
    by_mixup = (np.ptp(kept, axis=(2, 3)) < 1e-5) & (lam > 1e-3) & (lam < 1 - 1e-3)
    assert 0.35 < by_mixup.mean() < 0.8 * 0.7
    correlation = np.corrcoef(lam.T)
    assert np.abs(correlation - np.eye(BATCH)).max() < 0.1
    boxes = [box_of(kept[k, i] < 0.5) for k in range(200) for i in range(BATCH) if not by_mixup[k, i]]
    assert len({box for box in boxes if box}) > 50


def test_partners_share_their_draw_in_pair_mode():
    settings = {"mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.8, "switch_prob": 0.5, "mixup_mode": "pair"}
    mixed, targets = draw(600, 16, 12, **settings)
    own, other = np.arange(BATCH)[None, :, None, None], np.array(PARTNERS)[None, :, None, None]
    kept = (mixed - other) / (own - other)
    lam = targets[:, np.arange(BATCH), np.arange(BATCH)]
    chex.assert_trees_all_close(kept.mean((2, 3)), lam, atol=1e-5)
    chex.assert_trees_all_close(kept, kept[:, PARTNERS], atol=1e-5)
    assert np.abs(np.corrcoef(lam[:, :3].T) - np.eye(3)).max() < 0.15


def test_images_of_a_smaller_batch_share_a_draw():
    mixed, targets = draw(400, 16, 12, mixup=0.4, cutmix=1.0, mixup_batch=2)
    lam = targets[:, np.arange(BATCH), np.arange(BATCH)]
    chex.assert_trees_all_close(lam[:, ::2], lam[:, 1::2], atol=1e-6)
    assert np.abs(np.corrcoef(lam[:, ::2].T) - np.eye(3)).max() < 0.2
    own, other = np.arange(BATCH)[None, :, None, None], np.array(PARTNERS)[None, :, None, None]
    kept = (mixed - other) / (own - other)
    chex.assert_trees_all_close(kept[:, ::2], kept[:, 1::2], atol=1e-5)
    chex.assert_trees_all_close(kept.mean((2, 3)), lam, atol=1e-5)


def test_no_mixing_leaves_the_batch():
    mixed, targets = draw(3, mixup=0.0, cutmix=0.0, label_smoothing=0.1)
    assert (mixed == np.arange(BATCH)[None, :, None, None]).all()
    chex.assert_trees_all_close(targets[0], np.asarray(one_hot_smooth(LABELS, BATCH, 0.1)))


def test_train_augment_order():
    """Without mixing, what is not erased is the normalised image, and the noise is not normalised again."""
    config = DataConfig(image_size=16, mixup=0.0, cutmix=0.0, random_erasing=1.0, label_smoothing=0.1)
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    labels = jnp.arange(64) % 10
    out, targets = jax.jit(lambda key: train_augment(key, images, labels, config, 10))(jax.random.key(3))
    assert out.dtype == targets.dtype == jnp.float32
    reference = (images / 255.0 - np.array(config.mean)) / np.array(config.std)
    same = np.isclose(out, reference, atol=1e-5)
    assert 0.6 < same.mean() < 0.95
    noise = np.asarray(out)[~same]
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    chex.assert_trees_all_close(targets, one_hot_smooth(labels, 10, 0.1))


def test_train_augment_in_bfloat16():
    """The same images as in float32, rounded before they are mixed and after."""
    config = DataConfig(image_size=16, mixup_mode="elem")
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    step = jax.jit(lambda key, dtype: train_augment(key, images, jnp.arange(32), config, 32, dtype), static_argnums=1)
    (wide, targets), (narrow, same) = (step(jax.random.key(4), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(targets, same)
    chex.assert_trees_all_close(narrow.astype(jnp.float32), wide, rtol=2**-8, atol=3 * 2**-8)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_the_same_on_one_and_on_eight_devices(mode):
    config = DataConfig(image_size=8, mixup_mode=mode)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    labels = np.arange(16, dtype=np.int32)
    step = jax.jit(lambda key, images, labels: train_augment(key, images, labels, config, 16))
    assert len(jax.devices()) == 8
    rows = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
    for seed in range(3):
        alone = step(jax.random.key(seed), images, labels)
        shared = step(jax.random.key(seed), jax.device_put(images, rows), jax.device_put(labels, rows))
        assert len(shared[0].sharding.device_set) == 8
        chex.assert_trees_all_close(jax.device_get(alone), jax.device_get(shared), atol=1e-6)


def test_no_image_changes_devices():
    config = DataConfig(image_size=8)
    rows = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
    arguments = (
        jax.ShapeDtypeStruct((64, 8, 8, 3), jnp.uint8, sharding=rows),
        jax.ShapeDtypeStruct((64,), jnp.int32, sharding=rows),
    )
    step = lambda images, labels: train_augment(jax.random.key(0), images, labels, config, 16)  # noqa: E731
    program = jax.jit(step, out_shardings=rows).lower(*arguments).compile().as_text()
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in program
