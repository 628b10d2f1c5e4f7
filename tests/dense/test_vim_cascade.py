"""Vim's detector: what it does otherwise than mmdet's, against numbers by hand, and its official names."""

import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import manifest, save_pth, weights_of
from recorded_retinanet import GivenMaps

from evmamba_jax import create_model
from evmamba_jax.arrays import merge, split
from evmamba_jax.detection import Objects, create_detector
from evmamba_jax.detection.anchors import Anchors, Detectron2Anchors
from evmamba_jax.detection.boxes import DeltaCoder
from evmamba_jax.detection.masks import mask_targets
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.proposals import Limits
from evmamba_jax.detection.rcnn import Settings
from evmamba_jax.detection.sampling import Chosen, Sampler
from evmamba_jax.detection.vim_cascade import VimCascade, anchors_of
from evmamba_jax.errors import UserError
from evmamba_jax.heads.conv import ChannelNorm
from evmamba_jax.heads.simple_pyramid import SimplePyramid
from evmamba_jax.layers.activations import gelu
from evmamba_jax.weights import from_torch, to_torch

SMALL = {"depth": 1, "width": 16, "d_state": 2, "image_size": 64}
SETTINGS = Settings(Sampler(16, 8), Sampler(12, 4), Limits(20, 10), Limits(20, 10))


def detector(**options):
    return create_detector("vim_cascade", backbone="vim_t", num_classes=3, width=8, backbone_options=SMALL, **options)


@pytest.fixture(scope="module")
def on_maps():
    """Return a detector of given maps, and these."""
    rngs = nnx.Rngs(0)
    sizes = {"width": 8, "fc_width": 8, "settings": SETTINGS, "anchors": anchors_of()}
    model = VimCascade(GivenMaps(), [4], SimplePyramid(4, 16, width=8, rngs=rngs), 3, **sizes, rngs=rngs)
    return model, [jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 4)), jnp.float32)]


def test_an_anchor_that_is_given_to_an_object_stays_with_the_one_that_overlaps_it_most():
    anchors = jnp.asarray([[0, 0, 10, 10], [40, 40, 50, 50.0]])
    # The first anchor is the best of both objects, and overlaps the first one more.
    boxes, valid = jnp.asarray([[0, 0, 10, 6], [0, 0, 10, 4.0]]), jnp.asarray([True, True])
    for reassigns, wanted in ((True, [2, 0]), (False, [1, 0])):
        found = Matcher(0.7, 0.3, reassigns=reassigns)(anchors, boxes, valid)
        np.testing.assert_array_equal(found.index, wanted)


def test_sizes_shrink_without_a_limit():
    box, deltas = jnp.asarray([0, 0, 100, 100.0]), jnp.asarray([0, 0, -8, 8.0])
    limited, free = (coder.decode(box, deltas) for coder in (DeltaCoder(), DeltaCoder(smallest=-math.inf)))
    np.testing.assert_allclose(limited[2] - limited[0], 1.6, rtol=1e-4)
    np.testing.assert_allclose(free[2] - free[0], 100 * math.exp(-8), rtol=1e-2)
    np.testing.assert_allclose(free[3] - free[1], 6250, rtol=1e-5)


def test_anchors_differ_from_mmdets_by_rounding_alone():
    own, theirs = (kind(strides=(4, 8), scales=(8.0,)) for kind in (Detectron2Anchors, Anchors))
    for level, side in enumerate((32, 64)):
        base = own.base(level, np.float64)
        np.testing.assert_allclose(base, theirs.base(level, np.float64), rtol=1e-14)
        width = math.sqrt(side**2.0 / 0.5)
        np.testing.assert_array_equal(base[0], [-width / 2, -0.5 * width / 2, width / 2, 0.5 * width / 2])


def test_a_mask_goes_on_beyond_the_image_as_it_ends_there():
    masks = jnp.zeros((1, 8, 8), bool).at[0, :6, :6].set(True)  # to the end of an image of 6x6
    box, index = np.asarray([[3, 3, 6.6, 6.6]], np.float32), jnp.asarray([0])
    assert not np.asarray(mask_targets(masks, index, box, 4))[0, -1].any()
    assert np.asarray(mask_targets(masks, index, box, 4, jnp.asarray([6, 6])))[0].all()


def test_levels_are_made_of_the_last_map():
    with jax.enable_x64(True):
        pyramid = SimplePyramid(4, 16, width=6, rngs=nnx.Rngs(1))
        x = np.random.default_rng(2).normal(size=(1, 4, 6, 4))
        levels = jax.jit(lambda x: pyramid([jnp.full_like(x, jnp.nan), x]))(x)
        chex.assert_shape(levels, [(1, 16, 24, 6), (1, 8, 12, 6), (1, 4, 6, 6), (1, 2, 3, 6), (1, 1, 2, 6)])
        np.testing.assert_array_equal(levels[4], levels[3][:, ::2, ::2])

        def last(level, x):
            return level.output(level.lateral(x))

        np.testing.assert_allclose(levels[2], last(pyramid.levels[2], x), rtol=1e-6)
        pooled = x.reshape(1, 2, 2, 3, 2, 4).max((2, 4))
        np.testing.assert_allclose(levels[3], last(pyramid.levels[3], pooled), rtol=1e-6)
        fine = pyramid.levels[0].enlarge
        assert (fine.conv1.kernel.shape, fine.conv2.kernel.shape) == ((2, 2, 4, 2), (2, 2, 2, 1))
        larger = fine.conv2(gelu(fine.norm(fine.conv1(jnp.asarray(x)))))
        np.testing.assert_allclose(levels[0], last(pyramid.levels[0], larger), rtol=1e-6)
        normed = ChannelNorm(4, rngs=nnx.Rngs(0))(jnp.asarray(x))
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(normed, (x - x.mean(-1, keepdims=True)) / deviation, rtol=1e-6)
    with pytest.raises(UserError, match="maps every 32 pixels"):
        SimplePyramid(4, 32, rngs=nnx.Rngs(0))


def test_later_rounds_train_on_all_regions_of_the_round_before(on_maps):
    model, maps = on_maps
    boxes = jnp.asarray([[[4, 4, 50, 60], [jnp.nan] * 4]] * 2)
    masks = jnp.zeros((2, 2, 64, 96), bool).at[:, 0, 10:40, 10:40].set(True)
    objects = Objects(boxes, jnp.asarray([[1, 7]] * 2), jnp.asarray([[True, False], [False, False]]), masks)
    sizes = jnp.asarray([[64, 96], [50, 60]])
    structure, params, stats = split(model)

    @jax.jit
    def run(params):
        def total(params):
            model = merge(structure, params, stats)
            choose = lambda *of: SETTINGS.regions(*of, jax.random.key(1))  # noqa: E731
            features = model.outputs(model.pyramid(maps))
            losses, rounds = model.trained(features, objects, sizes, sizes, Chosen, [choose, Chosen, Chosen])
            return losses.total, (losses, [one.regions for one in rounds])

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, (losses, rounds)), gradients = run(params)
    chex.assert_tree_all_finite((losses, gradients))
    chex.assert_shape([*losses], [(5,), (5,), (3,), (3,), (1,)])
    counts = [np.asarray(one.valid.sum(1)) for one in rounds]
    assert rounds[0].added[0].sum() == 1
    for before, after, of in zip(counts, counts[1:], rounds[1:], strict=False):
        np.testing.assert_array_equal(after, before)  # none was left without an area
        assert not np.asarray(of.added).any()
        assert of.boxes[1].max() <= 60


def test_box_heads_hand_a_third_of_their_gradient_on(on_maps):
    model, maps = on_maps
    levels = model.pyramid(maps)
    boxes, valid = jnp.asarray([[[3, 3, 40, 50.0]]] * 2), jnp.ones((2, 1), bool)

    def of_share(share):
        model.gradient_share = share
        return jax.jit(jax.value_and_grad(lambda levels: model.of_boxes(0, levels, boxes, valid)[0].sum()))(levels)

    whole, third = of_share(1.0), of_share(VimCascade.gradient_share)
    np.testing.assert_array_equal(third[0], whole[0])
    np.testing.assert_allclose(third[1][0] * 3, whole[1][0], rtol=1e-5, atol=1e-9)
    assert np.abs(whole[1][0]).max() > 0


def test_a_detector_is_built_by_name_with_official_names(tmp_path):
    model = nnx.eval_shape(lambda: detector())
    shapes = manifest(model)
    assert shapes["backbone.net.layers.0.mixer.in_proj.weight"] == (64, 16)
    assert shapes["backbone.simfp_2.3.weight"] == (8, 4, 2, 2)
    assert shapes["backbone.simfp_2.4.weight"] == (8, 4, 1, 1)
    assert shapes["backbone.simfp_5.2.norm.bias"] == (8,)
    assert shapes["roi_heads.box_predictor.2.bbox_pred.weight"] == (4, 1024)
    assert shapes["roi_heads.mask_head.predictor.weight"] == (3, 8, 1, 1)
    recorded = Path(__file__).parents[3] / "shared" / "dense" / "vimdet.json"
    if recorded.exists():
        heads = {name for name in shapes if not name.startswith("backbone.net.")}
        assert heads == json.loads(recorded.read_text())["state_dict"].keys()
    assert "backbone.net.norm_f.weight" not in shapes
    # The official file also has the tables of the rotary embedding, which it computes as its authors wrote it.
    place = np.arange(4, dtype=np.float32) / 4 * 14 / 10000 ** (np.arange(0, 8, 2, dtype=np.float32) / 8)[:, None]
    angles = np.repeat(place, 2, axis=0).T  # of 4 rows or columns, 8 channels
    both = np.concatenate([np.repeat(angles, 4, axis=0), np.tile(angles, (4, 1))], 1)
    tables = {f"backbone.net.rope.freqs_{of.__name__}": of(both) for of in (np.cos, np.sin)}
    given = weights_of(model) | tables
    save_pth(tmp_path / "model_final.pth", {"model": given, "iteration": 184_374})
    filled = detector(pretrained=tmp_path / "model_final.pth")
    back = to_torch(filled)
    assert back.keys() == given.keys()
    chex.assert_trees_all_close({name: back.pop(name) for name in tables}, tables, atol=1e-6)
    chex.assert_trees_all_equal(back, {name: given[name] for name in back})
    classifier = create_model("vim_t", **SMALL, num_classes=5)
    save_pth(tmp_path / "classifier.pth", {"model": weights_of(classifier)})
    from_classifier = detector(pretrained=tmp_path / "classifier.pth")
    np.testing.assert_array_equal(
        to_torch(from_classifier)["backbone.net.patch_embed.proj.weight"],
        weights_of(classifier)["patch_embed.proj.weight"],
    )
    with pytest.raises(UserError, match=r"1 missing: 'roi_heads.mask_head.deconv.bias'"):
        from_torch(filled, {name: array for name, array in given.items() if "deconv.bias" not in name})


def test_detections_have_fixed_shapes_and_backbones_one_size():
    model = nnx.eval_shape(lambda: detector(dtype=jnp.bfloat16))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    found = jax.eval_shape(lambda model, images: model.detect(images, limit=7), model, images)
    chex.assert_shape([found.boxes, found.scores, found.masks], [(2, 7, 4), (2, 7), (2, 7, 28, 28)])
    assert {found.boxes.dtype, found.masks.dtype} == {jnp.dtype(jnp.float32)}
    with pytest.raises(UserError, match="this backbone has four: take mask_rcnn"):
        nnx.eval_shape(lambda: create_detector("vim_cascade", backbone="evmamba_t"))
