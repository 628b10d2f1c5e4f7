"""Sampling, proposals, Mask R-CNN and Cascade Mask R-CNN, against loops in plain Python and numbers by hand."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import manifest, weights
from recorded_retinanet import GivenMaps

from evmamba_jax.arrays import merge, split
from evmamba_jax.detection import Objects, create_detector
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from evmamba_jax.detection.per_anchor import Raw
from evmamba_jax.detection.proposals import Limits, proposals
from evmamba_jax.detection.rcnn import ANCHORS, Settings
from evmamba_jax.detection.retinanet import RetinaNet
from evmamba_jax.detection.rounds import refined
from evmamba_jax.detection.sampling import Candidates, Chosen, Sampler, candidates, regions
from evmamba_jax.detection.vim_cascade import VimCascade
from evmamba_jax.errors import UserError
from evmamba_jax.heads.simple_pyramid import SimplePyramid
from evmamba_jax.layers.norm import BatchNorm
from evmamba_jax.weights import from_torch, to_torch

MATCHER = MaskRCNN.rounds[0].matcher
GOLDEN = Path(__file__).parents[1] / "golden" / "dense"
SMALL = {"depths": (1, 0, 1, 1), "d_state": 2}


def test_samples_are_of_the_right_kinds_and_numbers_and_by_chance():
    rng = np.random.default_rng(0)
    kinds = rng.choice(3, (3, 40), p=[0.3, 0.5, 0.2])
    kinds[1, kinds[1] == 0] = 2  # no positive one
    kinds[2, 5:] = 2  # fewer than asked for
    positive, negative = jnp.asarray(kinds == 0), jnp.asarray(kinds == 1)
    draw = jax.jit(jax.vmap(lambda key: Sampler(12, 4)(positive, negative, key)))
    drawn = draw(jax.random.split(jax.random.key(0), 400))
    assert not (drawn.positive & ~positive).any()
    assert not (drawn.negative & ~negative).any()
    had = np.minimum(np.asarray(positive.sum(1)), 4)
    np.testing.assert_array_equal(drawn.positive.sum(2), np.broadcast_to(had, (400, 3)))
    rest = np.minimum(12 - had, np.asarray(negative.sum(1)))
    np.testing.assert_array_equal(drawn.negative.sum(2), np.broadcast_to(rest, (400, 3)))
    # All are as likely: 4 of the positive ones of the first image, five deviations of 400 draws.
    share = np.asarray(drawn.positive[:, 0].mean(0))[kinds[0] == 0]
    count = len(share)
    assert np.abs(share - 4 / count).max() < 5 * (4 / count * (1 - 4 / count) / 400) ** 0.5


def test_objects_come_first_and_regions_by_kind():
    boxes = jnp.asarray([[[0, 0, 10, 10], [20, 20, 30, 30], [jnp.nan] * 4]])
    objects = Objects(boxes, jnp.asarray([[4, 2, 9]]), jnp.asarray([[True, True, False]]))
    proposed = jnp.asarray([[[50, 50, 60, 60], [1, 0, 10, 10], [20, 20, 30, 24], [0, 0, 0, 0], [21, 20, 30, 30.0]]])
    valid = jnp.asarray([[True, True, True, False, True]])
    found = jax.jit(candidates, static_argnums=3)(objects, proposed, valid, MATCHER)
    np.testing.assert_array_equal(found.index, [[1, 2, -1, 0, 1, 0, -1, 2]])
    np.testing.assert_array_equal(found.boxes[0, 2:4], [[0] * 4, [50, 50, 60, 60]])

    take = Chosen(found.index > 0, (found.index == 0) & (jnp.arange(8) != 3))
    np.testing.assert_array_equal(found.added, [[True, True, False] + [False] * 5])
    chosen = jax.jit(regions, static_argnums=(3, 4))(Candidates(*found), take, objects, 7, 5)
    np.testing.assert_array_equal(chosen.positive, [[True] * 4 + [False] * 3])
    np.testing.assert_array_equal(chosen.valid, [[True] * 5 + [False] * 2])
    np.testing.assert_array_equal(chosen.added, [[True] * 2 + [False] * 5])
    np.testing.assert_array_equal(chosen.number[0, :4], [0, 1, 0, 1])
    np.testing.assert_array_equal(chosen.labels, [[4, 2, 4, 2, 5, 5, 5]])
    np.testing.assert_array_equal(chosen.boxes[0, 2:6], [proposed[0, 1], proposed[0, 4], proposed[0, 2], [0] * 4])
    few = jax.jit(regions, static_argnums=(3, 4))(Candidates(*found), take, objects, 3, 5)
    more = jax.jit(regions, static_argnums=(3, 4))(Candidates(*found), take, objects, 20, 5)
    chex.assert_trees_all_equal(few, jax.tree.map(lambda x: x[:, :3], chosen))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[:, :7], more), chosen)
    np.testing.assert_array_equal(more.valid.sum(), 5)


def test_planted_proposals_are_found():
    grid = Anchors((4, 8), scales=(2.0,))
    logits = [jnp.full((1, 8, 8, 3), -9.0), jnp.full((1, 4, 4, 3), -9.0)]
    deltas = [jnp.zeros((1, 8, 8, 12)), jnp.zeros((1, 4, 4, 12))]
    # Squares of 8 pixels around (12, 8) and, worse, half beside it on the same level; of 16 on the other.
    logits[0] = logits[0].at[0, 2, 3, 1].set(3.0).at[0, 2, 5, 1].set(1.0).at[0, 7, 7, 1].set(2.0)
    logits[1] = logits[1].at[0, 1, 1, 1].set(0.0)
    deltas[0] = deltas[0].at[0, 2, 5, 4].set(-0.9)
    found = jax.jit(lambda *raw: proposals(Raw(*raw), jnp.asarray([[20, 24]]), grid, Limits(4, 6)))(logits, deltas)
    wanted = [[8, 4, 16, 12], [0, 0, 16, 16]]
    np.testing.assert_allclose(found.boxes[0, :2], wanted, atol=1e-5)
    np.testing.assert_allclose(found.scores[0, :2], 1 / (1 + np.exp([-3.0, 0])), rtol=1e-6)
    # The square around (28, 28) lies beyond the image; the one beside the best overlaps it by more than .7.
    assert found.valid[0].sum() <= 6
    assert float(found.scores[0, 2]) < 1e-3
    gradient = jax.grad(
        lambda deltas: proposals(Raw(logits, deltas), jnp.asarray([[20, 24]]), grid, Limits(4, 6))[0].sum()
    )
    assert not any(np.asarray(level).any() for level in jax.jit(gradient)(deltas))


def mask_rcnn(**options):
    return create_detector("mask_rcnn", backbone="evmamba_t", **options)


def test_official_names_and_shapes_of_the_released_detector():
    recorded = json.loads((GOLDEN / "whole_efficientvmamba.json").read_text())["state_dict"]
    model = nnx.eval_shape(lambda: mask_rcnn())
    shapes = {name: list(shape) for name, shape in manifest(model).items()}
    assert shapes == {name: shape for name, (shape, _, _) in recorded.items() if "num_batches" not in name}


def test_weights_go_both_ways():
    model = mask_rcnn(num_classes=3, width=8, backbone_options=SMALL)
    given = weights(manifest(model))
    from_torch(model, given)
    back = to_torch(model)
    chex.assert_trees_all_equal({name: back[name] for name in given}, given)
    # The first fully connected layer reads channel, row, column there and row, column, channel here.
    kernel = np.asarray(model.box_heads[0].fcs[0].kernel[...]).reshape(7, 7, 8, 1024)
    official = given["roi_head.bbox_head.shared_fcs.0.weight"].reshape(1024, 8, 7, 7)
    np.testing.assert_array_equal(kernel[2, 5, 3], official[:, 3, 2, 5])


def test_a_detector_has_losses_detections_and_masks_of_fixed_shapes():
    model = nnx.eval_shape(lambda: mask_rcnn(num_classes=3, width=8, dtype=jnp.bfloat16, backbone_options=SMALL))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    objects = Objects(
        jnp.ones((2, 1, 4)), jnp.ones((2, 1), int), jnp.ones((2, 1), bool), jnp.ones((2, 1, 64, 96), bool)
    )

    def run(model, images):
        return model.detect(images, limit=7), model.loss(images, objects, key=jax.random.key(0)), model(images)

    found, loss, features = jax.eval_shape(run, model, images)
    chex.assert_shape([found.boxes, found.scores, found.labels, found.count], [(2, 7, 4), (2, 7), (2, 7), (2,)])
    chex.assert_shape(found.masks, (2, 7, 28, 28))
    chex.assert_shape([*loss], [(5,), (5,), (1,), (1,), (1,)])
    assert {found.boxes.dtype, found.masks.dtype, loss.masks.dtype} == {jnp.dtype(jnp.float32)}
    assert [level.shape[1:3] for level in features.levels] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert features.raw.logits[0].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="no masks"):
        jax.eval_shape(
            lambda model, x: model.loss(x, objects._replace(masks=None), key=jax.random.key(0)), model, images
        )


def test_images_without_objects_are_background_and_padding_does_not_matter():
    settings = Settings(Sampler(16, 8), Sampler(12, 4), Limits(20, 10), Limits(20, 10))
    sizes = {"width": 4, "fc_width": 8, "settings": settings}
    model = CascadeMaskRCNN(GivenMaps(), [4, 4, 4, 4], None, 3, **sizes, rngs=nnx.Rngs(0))
    model.train()
    rng = np.random.default_rng(1)
    maps = [jnp.asarray(rng.normal(size=(2, 64 // stride, 64 // stride, 4)), jnp.float32) for stride in (4, 8, 16, 32)]
    boxes = jnp.asarray([[[4, 4, 50, 60], [jnp.nan] * 4]] * 2)
    masks = jnp.zeros((2, 2, 64, 64), bool).at[:, 0, 10:40, 10:40].set(True)
    size = jnp.asarray([[64, 64], [50, 60]])
    structure, params, stats = split(model)

    @jax.jit
    def run(params, valid):
        def total(params):
            model = merge(structure, params, stats)
            objects = Objects(boxes, jnp.asarray([[1, 7]] * 2), valid, masks)
            first, *rest = jax.random.split(jax.random.key(2), 1 + len(model.rounds))
            by = lambda sampler, key: lambda *of: sampler(*of, key)  # noqa: E731
            choose = by(settings.anchors, first), [by(settings.regions, one) for one in rest]
            losses, rounds = model.trained(model.outputs(maps), objects, jnp.full((2, 2), 64), size, *choose)
            return losses.total, (losses, [one.regions for one in rounds])

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, (losses, rounds)), gradients = run(params, jnp.asarray([[True, False], [False, False]]))
    chex.assert_tree_all_finite((losses, gradients))
    for one in rounds:
        assert one.added[0].sum() == 1
        np.testing.assert_array_equal(one.positive[1], np.zeros(12, bool))
        np.testing.assert_array_equal(one.labels[1], np.full(12, 3))
        assert one.boxes[1].max() <= 60
    assert (np.asarray(losses.masks) > 0).all()
    (_, (losses, rounds)), gradients = run(params, jnp.zeros((2, 2), bool))
    chex.assert_tree_all_finite((losses, gradients))
    assert float(losses.boxes.sum()) == float(losses.masks.sum()) == float(losses.rpn_boxes.sum()) == 0
    assert (np.asarray(losses.classes) > 0).all()
    assert not any(np.asarray(gradient).any() for name, gradient in gradients.items() if "mask_head" in name)


def test_a_round_moves_boxes_by_their_own_class_or_the_likeliest():
    coder = MaskRCNN.rounds[0].coder
    boxes = jnp.asarray([[[10, 10, 20, 20], [10, 10, 20, 20], [50, 50, 60, 60.0]]])
    deltas = jnp.zeros((1, 3, 2, 4)).at[:, :, 0, 0].set(5.0).at[:, :, 1, 1].set(-5.0)  # half a width right, half up
    logits = jnp.asarray([[[0, 1, 9.0], [0, 1, 9], [1, 0, 9]]])  # the background does not count
    found = refined(coder, boxes, jnp.asarray([[0, 2, 2]]), logits, deltas, jnp.asarray([[58, 64]]))
    np.testing.assert_allclose(found, [[[15, 10, 25, 20], [10, 5, 20, 15], [55, 50, 64, 58]]], rtol=1e-5)


def test_a_cascade_is_built_by_name_with_official_names():
    options = {"num_classes": 3, "width": 8, "backbone_options": SMALL}
    model = nnx.eval_shape(lambda: create_detector("cascade_mask_rcnn", backbone="evmamba_t", **options))
    shapes = manifest(model)
    assert shapes["roi_head.bbox_head.2.shared_convs.3.bn.running_var"] == (8,)
    assert shapes["roi_head.bbox_head.1.shared_fcs.0.weight"] == (1024, 8 * 49)
    assert shapes["roi_head.mask_head.2.upsample.weight"] == (8, 8, 2, 2)
    assert "roi_head.bbox_head.0.shared_convs.0.conv.bias" not in shapes
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    found = jax.eval_shape(lambda model, images: model.detect(images, limit=5), model, images)
    chex.assert_shape([found.boxes, found.masks], [(1, 5, 4), (1, 5, 28, 28)])


def test_norms_leave_padding_out():
    x = np.random.default_rng(3).normal(2, 3, (5, 3, 3, 2)).astype(np.float32)
    counted = np.asarray([True, False, True, True, False])
    x[~counted] = 1000
    norm, alone = (BatchNorm(2, rngs=nnx.Rngs(0)) for _ in range(2))
    norm.train(), alone.train()
    np.testing.assert_allclose(norm(jnp.asarray(x), jnp.asarray(counted))[counted], alone(x[counted]), atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x[counted].mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x[counted].reshape(-1, 2).var(0, ddof=1), rtol=1e-5)


def test_anchors_are_the_published_ones_unless_asked_for():
    assert ANCHORS.scales == (8.0,)
    assert nnx.eval_shape(lambda: mask_rcnn(width=8, octave_base_scale=2.0)).anchors.scales == (2.0,)
    with pytest.raises(UserError, match="octave_base_scale=0"):
        mask_rcnn(octave_base_scale=0)


def test_numbers_of_boxes_are_the_published_ones_unless_asked_for():
    few = nnx.eval_shape(lambda: mask_rcnn(width=8, fc_width=16, regions=32, proposals=50))
    assert few.settings == Settings(Sampler(256, 128), Sampler(32, 8), Limits(50, 50), Limits(50, 50))
    assert few.box_heads[0].fcs[1].kernel.shape == (16, 16)
    assert nnx.eval_shape(lambda: mask_rcnn(width=8, regions=32)).settings.trained == Limits(2000, 1000)
    with pytest.raises(UserError, match="regions=3 is not allowed: it must be a whole number of at least 4"):
        mask_rcnn(regions=3)
    with pytest.raises(UserError, match="proposals is for detectors with regions, and 'retinanet' has none"):
        create_detector("retinanet", backbone="evmamba_t", proposals=50)


def test_layers_that_tell_classes_have_their_number():
    def made(kind, classes):
        rngs = nnx.Rngs(0)
        pyramid = SimplePyramid(4, 16, width=4, rngs=rngs) if kind is VimCascade else None
        return kind(GivenMaps(), [4] * 4, pyramid, classes, width=4, rngs=rngs)

    for kind in (RetinaNet, MaskRCNN, CascadeMaskRCNN, VimCascade):
        few, many = (nnx.eval_shape(lambda: made(kind, classes)) for classes in (2, 3))  # noqa: B023
        shapes = [{path: array.shape for path, array in split(model).params.items()} for model in (few, many)]
        differing = {path for path, shape in shapes[0].items() if shape != shapes[1][path]}
        assert {f"{layer}.{part}" for layer in few.class_layers for part in ("kernel", "bias")} == differing
