"""UperNet and its inference against slow references and recorded official results; names; what is refused."""

import functools
import importlib
import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import save_pth, weights_of

from evmamba_jax.arrays import merge, split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.data import opencv
from evmamba_jax.errors import UserError
from evmamba_jax.heads.conv import PixelClassifier
from evmamba_jax.heads.maps import Deconv, PlainPyramid
from evmamba_jax.heads.resize import adaptive_average_pool, bilinear
from evmamba_jax.models import abstract_model
from evmamba_jax.segmentation import (
    create_segmenter,
    cross_entropy,
    multi_scale,
    pixel_accuracy,
    slide,
    to_original,
    whole,
)
from evmamba_jax.segmentation.inference import window_starts
from evmamba_jax.weights import from_torch, to_torch
from evmamba_jax.weights.convert import table

GOLDEN = Path(__file__).parents[1] / "golden" / "dense"
SMALL = {"num_classes": 5, "width": 8, "aux_width": 6}


def upernet(backbone, **options):
    """Return a UperNet; options that are not of its heads are the backbone's."""
    heads = ("num_classes", "width", "aux_width", "dropout", "dtype", "pretrained")
    own = {name: options.pop(name) for name in heads if name in options}
    return create_segmenter("upernet", backbone=backbone, backbone_options=options, **own)


@functools.cache
def segmenter(backbone="evmamba_t", **options):
    if backbone.startswith("evmamba"):
        options = {"depths": (0, 0, 1, 0)} | options
    return upernet(backbone, **SMALL | options)


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape, dtype)


def arrays_of(model):
    _, params, stats = split(model)
    return {path: np.asarray(array) for path, array in {**params, **stats}.items()}


# Recorded


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_upernet_is_the_recorded_one(x64):
    with jax.enable_x64(x64):
        found = list(importlib.import_module("recorded_upernet").compare(GOLDEN, x64))
    assert len(found) == 46
    assert [one for one in found if not one.difference <= one.limit] == []


def test_images_are_opencvs_to_the_pixel():
    recorded = np.load(GOLDEN / "opencv.npz")
    image = recorded["image"]
    chex.assert_trees_all_equal(opencv.bgr_to_hsv(image), recorded["image_to_hsv"])
    chex.assert_trees_all_equal(opencv.hsv_to_bgr(recorded["hsv"]), recorded["hsv_to_image"])
    for name in recorded:
        if name.startswith(("bilinear", "nearest")):
            method, *size = name.split("_")
            resize = {"bilinear": opencv.resize_bilinear, "nearest": opencv.resize_nearest}[method]
            chex.assert_trees_all_equal(resize(image, *map(int, size)), recorded[name])


# Images on the host


def test_resizing_one_channel_is_resizing_that_of_three():
    image = np.random.default_rng(1).integers(0, 256, (13, 17, 3), np.uint8)
    resized = opencv.resize_bilinear(image, 21, 9)
    chex.assert_trees_all_equal(opencv.resize_bilinear(image[..., 1], 21, 9), resized[..., 1])
    same = opencv.resize_bilinear(image, 13, 17)
    chex.assert_trees_all_equal(same, image)
    assert not np.shares_memory(same, image)


def test_sizes_keep_the_ratio_within_both_limits():
    assert opencv.keep_ratio_size(480, 640, (1333, 800)) == (800, 1067)
    assert opencv.keep_ratio_size(480, 640, (800, 1333)) == (800, 1067)
    assert opencv.keep_ratio_size(100, 1000, (1333, 800)) == (133, 1333)
    assert opencv.scaled_size(90, 121, 0.75) == (68, 91)


def test_distortions_limit_and_cut_off():
    image = np.array([[[0, 100, 250]]], np.uint8)
    assert opencv.adjust_brightness(image, 17.6).tolist() == [[[17, 117, 255]]]
    assert opencv.adjust_brightness(image, -17.6).tolist() == [[[0, 82, 232]]]
    assert opencv.adjust_contrast(image, 0.505).tolist() == [[[0, 50, 126]]]
    red = np.array([[[0, 0, 255]]], np.uint8)
    assert opencv.adjust_hue(red, 60).tolist() == [[[0, 255, 0]]]
    assert opencv.adjust_hue(red, -60).tolist() == [[[255, 0, 0]]]
    assert opencv.adjust_saturation(red, 0.0).tolist() == [[[255, 255, 255]]]


# Maps


@pytest.mark.parametrize("shape", [(5, 7), (4, 3), (6, 12), (1, 2)])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_adaptive_pooling_is_the_mean_of_each_cell(shape, side):
    x = random(2, *shape, 3)
    wanted = np.empty((2, side, side, 3))
    cells = [[slice(i * n // side, -(-(i + 1) * n // side)) for i in range(side)] for n in shape]
    for i, j in itertools.product(range(side), repeat=2):
        wanted[:, i, j] = x[:, cells[0][i], cells[1][j]].astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), side), wanted, atol=1e-6)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(5, 13), (17, 4), (1, 1), (7, 9)])
def test_bilinear_takes_two_neighbours_along_each_axis(size, corners):
    x = random(1, 7, 9, 2)

    def place(i, old, new):
        at = i * (old - 1) / max(new - 1, 1) if corners else max((i + 0.5) * old / new - 0.5, 0.0)
        first = min(int(at), old - 1)
        return first, min(first + 1, old - 1), at - first

    wanted = np.empty((1, *size, 2))
    for i, j in np.ndindex(*size):
        top, bottom, v = place(i, 7, size[0])
        left, right, h = place(j, 9, size[1])
        above = (1 - h) * x[0, top, left] + h * x[0, top, right]
        below = (1 - h) * x[0, bottom, left] + h * x[0, bottom, right]
        wanted[0, i, j] = (1 - v) * above + v * below
    np.testing.assert_allclose(bilinear(jnp.asarray(x), *size, align_corners=corners), wanted, atol=1e-6)


def test_maps_in_bfloat16_are_weighed_in_float32():
    x = jnp.asarray(random(1, 64, 64, 1) + 100).astype(jnp.bfloat16)
    pooled = adaptive_average_pool(x, 1)
    assert pooled.dtype == jnp.bfloat16
    assert pooled.item() == jnp.asarray(np.asarray(x, np.float64).mean()).astype(jnp.bfloat16)
    assert bilinear(x, 3, 5).dtype == jnp.bfloat16


def test_deconv_makes_four_pixels_of_one():
    layer = Deconv(3, 2, dtype=None, rngs=nnx.Rngs(0))
    kernel, bias, x = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...]), random(1, 2, 3, 3)
    y = np.asarray(layer(jnp.asarray(x)))
    chex.assert_shape(y, (1, 4, 6, 2))
    for i, j in np.ndindex(4, 6):
        np.testing.assert_allclose(y[0, i, j], x[0, i // 2, j // 2] @ kernel[i % 2, j % 2] + bias, atol=1e-6)


@pytest.mark.parametrize(("stride", "sizes"), [(4, (64, 32, 16, 8)), (8, (128, 64, 32, 16)), (16, (256, 128, 64, 32))])
def test_a_pyramid_of_maps_of_one_size(stride, sizes):
    pyramid = nnx.eval_shape(lambda: PlainPyramid(6, stride, rngs=nnx.Rngs(0)))
    maps = jax.eval_shape(lambda module, x: module([x] * 4), pyramid, jax.ShapeDtypeStruct((2, 64, 64, 6), jnp.float32))
    assert [x.shape for x in maps] == [(2, side, side, 6) for side in sizes]


# Loss


def test_the_loss_is_divided_by_all_pixels_ignored_ones_too():
    logits, labels = random(2, 3, 5, 4), np.random.default_rng(1).integers(0, 4, (2, 3, 5)).astype(np.uint8)
    labels[0, :2] = 255
    total, weighted, counted = 0.0, 0.0, 0
    for place in np.ndindex(2, 3, 5):
        if labels[place] != 255:
            scores = logits[place].astype(np.float64)
            one = np.log(np.exp(scores).sum()) - scores[labels[place]]
            total += one
            weighted += one * (0.1, 1, 2, 3)[labels[place]]
            counted += 1
    np.testing.assert_allclose(cross_entropy(logits, labels), total / 30, rtol=1e-6)
    of_classes = cross_entropy(logits, labels, class_weights=(0.1, 1, 2, 3))
    np.testing.assert_allclose(of_classes, weighted / 30, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, labels, over_counted=True), total / counted, rtol=1e-6)
    right = (logits.argmax(-1) == labels).sum()
    np.testing.assert_allclose(pixel_accuracy(logits, labels), 100 * right / counted, rtol=1e-6)

    gradient = np.asarray(jax.grad(cross_entropy)(jnp.asarray(logits), jnp.asarray(labels)))
    assert (gradient[0, :2] == 0).all()
    assert (gradient[1] != 0).all()


def test_nothing_but_ignored_pixels_is_no_loss():
    logits, labels = random(1, 2, 2, 3), np.full((1, 2, 2), 255, np.uint8)
    assert cross_entropy(logits, labels) == cross_entropy(logits, labels, over_counted=True) == 0
    assert pixel_accuracy(logits, labels) == 0


def test_a_label_beyond_255_classes_counts():
    logits = jnp.zeros((1, 1, 2, 300))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([[[299, 255]]])), np.log(300) / 2, rtol=1e-6)


# Inference


@pytest.mark.parametrize("window", [1, 7, 16])
def test_windows_cover_every_pixel_and_stay_inside(window):
    for length, stride in itertools.product(range(1, 40), range(1, window + 1)):
        covered = np.zeros(length, bool)
        side = min(window, length)
        starts = window_starts(length, window, stride)
        for start in starts:
            assert 0 <= start <= length - side
            covered[start : start + side] = True
        assert covered.all()
        assert len(set(starts)) == len(starts)


def coarse(images):
    """Stand in for a segmenter: a quarter of the size, and other for each window, as it takes off the mean."""
    y = images[:, ::4, ::4]
    return jnp.concatenate([y - y.mean((1, 2), keepdims=True), y**2], -1)


@pytest.mark.parametrize("size", [(24, 40), (29, 37), (10, 50)])
def test_sliding_is_the_mean_over_the_windows_of_a_pixel(size):
    window, stride = (16, 20), (10, 13)
    images = jnp.asarray(random(2, *size, 2))
    total, count = np.zeros((2, *size, 4)), np.zeros((*size, 1))
    for top in range(0, max(size[0] - 16 + 9, 0) // 10 * 10 + 1, 10):
        for left in range(0, max(size[1] - 20 + 12, 0) // 13 * 13 + 1, 13):
            bottom, right = min(top + 16, size[0]), min(left + 20, size[1])
            rows, columns = slice(max(bottom - 16, 0), bottom), slice(max(right - 20, 0), right)
            total[:, rows, columns] += np.asarray(whole(coarse, images[:, rows, columns]))
            count[rows, columns] += 1
    ours = jax.jit(functools.partial(slide, coarse, window=window, stride=stride))(images)
    assert count.min() >= 1
    np.testing.assert_allclose(ours, total / count, atol=1e-5)


def test_padding_is_cut_off_before_mirroring_back():
    logits = random(1, 6, 9, 2)
    chex.assert_trees_all_equal(to_original(logits, (4, 7), unpadded=(4, 7)), logits[:, :4, :7])
    chex.assert_trees_all_equal(to_original(logits, (4, 7), unpadded=(4, 7), flipped=True), logits[:, :4, 6::-1])
    wanted = bilinear(jnp.asarray(logits[:, :4, :7]), 8, 5)
    chex.assert_trees_all_close(to_original(logits, (8, 5), unpadded=(4, 7)), wanted)


def test_several_scales_are_the_mean_of_probabilities():
    scaled = [jnp.asarray(random(1, *size, 2)) for size in ((8, 12), (16, 24))]

    def logits_of(images):
        return jnp.concatenate([images, jnp.cumsum(images, 2)], -1)  # not the same when mirrored

    views = [logits_of(x) for x in scaled] + [logits_of(x[:, :, ::-1])[:, :, ::-1] for x in scaled]
    wanted = np.mean([nnx.softmax(bilinear(view, 10, 15)) for view in views], 0)
    np.testing.assert_allclose(multi_scale(logits_of, scaled, (10, 15)), wanted, atol=1e-6)
    wanted = np.mean([nnx.softmax(bilinear(view, 10, 15)) for view in views[:2]], 0)
    np.testing.assert_allclose(multi_scale(logits_of, scaled, (10, 15), flip=False), wanted, atol=1e-6)


# Segmenters


def test_float32_and_bfloat16_agree_and_give_float32():
    images = jnp.asarray(random(1, 61, 83, 3))
    narrow = segmenter(dtype=jnp.bfloat16)
    arrays = split(narrow)[1:]
    logits = jax.jit(lambda x: narrow(x))(images)
    chex.assert_shape(logits, (1, 15, 20, 5))  # of patches of 4 pixels
    assert logits.dtype == jnp.float32
    wide = merge(split(segmenter())[0], *arrays)
    exact = jax.jit(lambda x: wide(x))(images)
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())


def test_a_training_step_in_bfloat16():
    model = merge(*split(segmenter(dtype=jnp.bfloat16, drop_path_rate=0.1)))
    model.train()
    graphdef, params, stats = split(model)
    images, labels = jnp.asarray(random(2, 64, 64, 3)), np.random.default_rng(0).integers(0, 5, (2, 64, 64))
    labels[0, :9] = 255

    def loss(params, key):
        twin = merge(graphdef, params, stats)
        total, parts = twin.loss(images, jnp.asarray(labels), key=key)
        return total, (parts, split(twin).batch_stats)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, (parts, after)), gradients = step(params, jax.random.key(0))
    assert set(parts) == {"loss", "aux_loss", "accuracy", "aux_accuracy"}
    assert {x.dtype for x in [total, *parts.values(), *gradients.values(), *after.values()]} == {jnp.dtype("float32")}
    np.testing.assert_allclose(total, parts["loss"] + parts["aux_loss"])
    # Nearly equal logits at first: log 5 on average, less the ignored pixels.
    assert parts["loss"] == pytest.approx(np.log(5) * (labels != 255).mean(), rel=0.1)
    assert parts["aux_loss"] == pytest.approx(0.4 * np.log(5) * (labels != 255).mean(), rel=0.1)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert not np.array_equal(after["decode_head.fuse.norm.mean"], stats["decode_head.fuse.norm.mean"])
    assert step(params, jax.random.key(1))[0][0] != total  # dropout draws from the key


def test_dropout_drops_whole_channels_and_asks_for_a_key():
    classifier = PixelClassifier(40, 1, dropout=0.5, rngs=nnx.Rngs(0))
    classifier.train()
    dropped = np.asarray(classifier.dropout(jnp.ones((3, 2, 2, 40)), jax.random.key(0)))
    assert (dropped == dropped[:, :1, :1]).all()
    assert set(np.unique(dropped)) == {0, 2}
    with pytest.raises(ValueError, match="random key"):
        classifier(jnp.ones((3, 2, 2, 40)), None)


@functools.cache
def abstract(backbone, **options):
    return nnx.eval_shape(lambda: upernet(backbone, **options))


@pytest.mark.parametrize(
    ("backbone", "options", "millions"),
    [
        ("evmamba_t", {"width": 256}, 14.49),
        ("vmamba_t", {}, 61.90),  # published 62
    ],
)
def test_sizes_and_names_of_published_segmenters(backbone, options, millions):
    model = abstract(backbone, **options)
    _, params, stats = split(model)
    assert sum(array.size for array in params.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    rows = [row for row in table(model) if row.ours in params | stats]
    assert sorted(row.ours for row in rows) == sorted(params | stats)
    assert len({row.official for row in rows}) == len(rows)
    assert {row.official.split(".")[0] for row in rows} == {"backbone", "decode_head", "auxiliary_head"}


def test_vims_maps_make_a_pyramid_with_official_names():
    model = abstract("vim_t", width=192, depth=4)
    maps = jax.eval_shape(lambda m, x: m.features(x), model, jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32))
    assert [x.shape for x in maps] == [(1, side, side, 192) for side in (128, 64, 32, 16)]
    official = {row.official for row in table(model)}
    assert {"backbone.fpn1.0.weight", "backbone.fpn1.1.running_var", "backbone.fpn1.3.bias"} <= official
    assert {"backbone.fpn2.0.weight", "backbone.norm_f.weight", "backbone.pos_embed"} <= official


def test_mambavision_takes_the_windows_of_its_segmenters():
    small = {"depths": (0, 0, 1, 0), **SMALL}
    assert abstract("mambavision_t", **small).backbone.config.window_size == (8, 8, 64, 32)
    assert abstract("mambavision_s", **small).backbone.config.window_size == (8, 8, 160, 56)
    own = abstract("mambavision_s", window_size=(8, 8, 4, 2), **small)
    assert own.backbone.config.window_size == (8, 8, 4, 2)


# Weights


def test_official_weights_go_there_and_back_to_the_bit():
    model = merge(*split(segmenter()))
    official = weights_of(model)
    assert official["decode_head.psp_modules.2.1.conv.weight"].shape == (8, 384, 1, 1)
    assert official["decode_head.bottleneck.conv.weight"].shape == (8, 384 + 4 * 8, 3, 3)
    assert official["auxiliary_head.convs.0.conv.weight"].shape == (6, 192, 3, 3)
    assert "backbone.outnorm3.bias" in official
    from_torch(model, official)
    back = to_torch(model)
    counters = [name for name in back if name not in official]
    assert all(name.endswith(".num_batches_tracked") for name in counters)
    chex.assert_trees_all_equal({name: back[name] for name in official}, official)
    from_torch(model, back)


def test_old_names_of_a_backbone_are_understood():
    model = upernet("vmamba_t", depths=(0, 1, 0, 0), **SMALL)
    official = weights_of(model)
    old = {name.replace(".blocks.0.norm.", ".blocks.0.ln_1."): array for name, array in official.items()}
    old = {name.replace(".op.", ".self_attention."): array for name, array in old.items()}
    assert old.keys() != official.keys()
    from_torch(model, old)
    chex.assert_trees_all_equal({k: v for k, v in to_torch(model).items() if k in official}, official)


def build(pretrained, **options):
    options = {"depths": (1, 0, 0, 0), "d_state": 2} | SMALL | options
    return upernet("evmamba_t", pretrained=pretrained, **options)


def test_a_classifier_fills_the_backbone_alone(tmp_path):
    classifier = abstract_model("evmamba_t", depths=(1, 0, 0, 0), d_state=2, num_classes=3)
    save_pth(tmp_path / "classifier.pth", {"state_dict": weights_of(classifier)})
    model, fresh = build(tmp_path / "classifier.pth"), build(None)
    official = weights_of(model)
    ours, initial = to_torch(model), to_torch(fresh)
    name = "backbone.layers.0.blocks.0.op.A_logs"
    wanted = weights_of(classifier)[name.removeprefix("backbone.")]
    chex.assert_trees_all_equal(ours[name], wanted)
    heads = [name for name in official if not name.startswith("backbone.") or "outnorm" in name]
    chex.assert_trees_all_equal({name: ours[name] for name in heads}, {name: initial[name] for name in heads})


def test_a_segmenters_file_or_checkpoint_fills_all_of_it(tmp_path):
    official = weights_of(build(None))
    save_pth(tmp_path / "segmenter.pth", {"state_dict": official, "meta": {"epoch": 3}})
    model = build(tmp_path / "segmenter.pth")
    assert model.decode_head.fuse.norm.use_running_average
    back = to_torch(model)
    chex.assert_trees_all_equal({name: back[name] for name in official}, official)
    _, params, batch_stats = split(model)
    save_model(tmp_path / "saved", params=params, batch_stats=batch_stats, meta={})
    chex.assert_trees_all_equal(arrays_of(build(tmp_path / "saved")), arrays_of(model))

    with pytest.raises(UserError, match=r"segmenter.pth does not fit upernet with evmamba_t: .*conv_seg") as caught:
        build(tmp_path / "segmenter.pth", num_classes=4)
    assert "\n" not in str(caught.value)


# Mistakes


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: create_segmenter("upernett", backbone="evmamba_t"), "did you mean 'upernet'"),
        (lambda: create_segmenter("upernet", backbone="evmamba_x"), "unknown model 'evmamba_x'"),
        (lambda: create_segmenter("upernet", backbone="evmamba_t", num_classes=0), "num_classes"),
        (lambda: create_segmenter("upernet", backbone="evmamba_t", width=-1), "width"),
        (lambda: create_segmenter("upernet", backbone="evmamba_t", dropout=1.5), "dropout"),
        (lambda: upernet("evmamba_t", out_norms=False), "out_norms.*leave it out"),
        (lambda: upernet("evmamba_t", dephts=(1, 1, 1, 1)), "did you mean 'depths'"),
        (lambda: upernet("vim_t", stride=3), "stride of 4, 8 or 16"),
        (
            lambda: create_segmenter("upernet", backbone="evmamba_t", pretrained="nowhere.pth", **SMALL),
            "does not exist",
        ),
        (lambda: slide(coarse, jnp.zeros((1, 9, 9, 1)), window=(4, 4), stride=(4, 5)), "stride"),
        (lambda: slide(coarse, jnp.zeros((1, 9, 9, 1)), window=(4, 4), stride=(0, 4)), "stride"),
        (lambda: multi_scale(coarse, [], (4, 4)), "no images"),
    ],
)
def test_a_mistake_is_one_line(call, said):
    with pytest.raises(UserError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
