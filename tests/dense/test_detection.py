"""Boxes, anchors, matches, suppression and the detector, against loops in plain NumPy and numbers by hand."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import manifest, save_pth, weights

from evmamba_jax.detection import Objects, create_detector
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import DeltaCoder, clip, overlaps
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.nms import TILE, batched_nms, multiclass_nms
from evmamba_jax.detection.per_anchor import Raw, targets
from evmamba_jax.detection.retinanet import ANCHORS, MATCHER, best_pairs, detections, losses
from evmamba_jax.errors import UserError
from evmamba_jax.heads.fpn import FPN, upsample
from evmamba_jax.models import abstract_model
from evmamba_jax.weights import from_torch, to_torch

SMALL = {"backbone": "evmamba_t", "num_classes": 3, "width": 16, "depths": (1, 0, 1, 1), "d_state": 2}


def iou(a, b):
    """Return the overlap of two boxes as Python computes it, in the type of their numbers."""
    w = max(min(a[2], b[2]) - max(a[0], b[0]), a.dtype.type(0))
    h = max(min(a[3], b[3]) - max(a[1], b[1]), a.dtype.type(0))
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return w * h / max(area_a + area_b - w * h, a.dtype.type(1e-6))


def some_boxes(rng, count, side=40, whole=True):
    """Return boxes, of whole numbers for many equal overlaps."""
    start, size = rng.uniform(0, side, (count, 2)), rng.uniform(4, side / 2, (count, 2))
    boxes = np.concatenate([start, start + size], 1)
    return (boxes.round() if whole else boxes).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_overlaps_round_every_step(dtype):
    rng = np.random.default_rng(0)
    a, b = (some_boxes(rng, n, whole=False).astype(dtype) for n in (90, 110))
    with jax.enable_x64(dtype == np.float64):
        ours, most = jax.jit(lambda a, b: (overlaps(a, b), overlaps(a, b).max(0)))(a, b)
    wanted = np.asarray([[iou(x, y) for y in b] for x in a])
    assert wanted.dtype == dtype
    np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(most, wanted.max(0))


def test_overlap_over_the_first_box_and_without_an_area():
    a, b = jnp.asarray([[0, 0, 4, 2.0], [1, 1, 1, 5]]), jnp.asarray([[2, 0, 8, 2.0], [9, 9, 9, 9]])
    np.testing.assert_allclose(overlaps(a, b, "iof"), [[0.5, 0], [0, 0]])
    np.testing.assert_allclose(overlaps(a, b), [[4 / 16, 0], [0, 0]])


def test_a_box_is_decoded_from_its_own_deltas():
    rng = np.random.default_rng(1)
    boxes, wanted = some_boxes(rng, 20, whole=False), some_boxes(rng, 20, whole=False)
    for coder in (DeltaCoder(), DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2))):
        np.testing.assert_allclose(coder.decode(boxes, coder.encode(boxes, wanted)), wanted, rtol=1e-4, atol=1e-4)
    far = DeltaCoder().decode(jnp.asarray([0, 0, 8.0, 8]), jnp.asarray([0, 0, 99.0, -99]))
    np.testing.assert_allclose(far[2:] - far[:2], [8 * 62.5, 8 / 62.5], rtol=1e-5)
    np.testing.assert_array_equal(clip(jnp.asarray([-3, 2, 50.0, 60]), jnp.asarray([30, 40])), [0, 2, 40, 30])


def test_anchors_by_hand():
    grid = Anchors(strides=(4, 8), ratios=(0.5, 1, 2), scales=(2, 3))
    first, second = grid.boxes([(2, 3), (1, 2)])
    chex.assert_shape([first, second], [(2 * 3 * 6, 4), (1 * 2 * 6, 4)])
    root = math.sqrt(2)
    np.testing.assert_allclose(first[0], [-4 * root, -2 * root, 4 * root, 2 * root], rtol=1e-6)  # twice as wide
    np.testing.assert_allclose(first[6 * (1 * 3 + 2) + 2], [8 - 4, 4 - 4, 8 + 4, 4 + 4])  # row 1, column 2, square
    np.testing.assert_allclose(second[6 + 3], [8 - 12, -12, 8 + 12, 12])
    inside = grid.inside([(2, 3), (1, 2)], jnp.asarray([4, 9]))
    np.testing.assert_array_equal(inside[0].reshape(2, 3, 6)[..., 0], [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(inside[1].reshape(2, 6)[:, 0], [True, True])


def loop_nms(boxes, scores, groups, valid, threshold):
    kept = []
    for i in sorted(np.flatnonzero(valid), key=lambda i: (-scores[i], i)):
        if all(groups[i] != groups[k] or not iou(boxes[k], boxes[i]) > np.float32(threshold) for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize(("threshold", "limit"), [(0.5, 2 * TILE + 90), (0.25, 40)])
def test_nms_is_the_greedy_loop(threshold, limit):
    count, rng = 2 * TILE + 90, np.random.default_rng(2)
    boxes = np.stack([some_boxes(rng, count, side) for side in (40, 90)])
    scores = rng.integers(0, 60, (2, count)).astype(np.float32)  # many equal ones
    groups, valid = rng.integers(0, 3, (2, count)), rng.uniform(size=(2, count)) < 0.9

    @jax.jit
    @jax.vmap
    def run(boxes, scores, groups, valid):
        return batched_nms(boxes, scores, groups, threshold, limit=limit, valid=valid)

    found = run(boxes, scores, groups, valid)
    for i in range(2):
        wanted = loop_nms(boxes[i], scores[i], groups[i], valid[i], threshold)[:limit]
        assert found.count[i] == len(wanted)
        np.testing.assert_array_equal(found.index[i], [*wanted, *[0] * (limit - len(wanted))])


def test_nms_keeps_an_equal_overlap_and_each_class_apart():
    boxes = jnp.asarray([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6], [50, 0, 60, 9.0]])
    scores = jnp.asarray([[0.9, 0.02], [0.8, 0.7], [0.7, 0.6], [0.04, 0.05]])
    found = multiclass_nms(jnp.repeat(boxes[:, None], 2, 1), scores, 0.05, 0.5, limit=6)
    # Half of the first box is kept, six tenths are not; of the second class its own best; .05 is not above .05.
    assert found.count == 3
    np.testing.assert_array_equal(found.index[:3], [0, 2, 3])
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(found.boxes[3:], np.zeros((3, 4)))


def loop_match(matcher, anchors, boxes, valid, inside, regions):
    index = [-1] * len(anchors)
    table = [[iou(box, anchor) for anchor in anchors] for box in boxes]
    kept = [j for j in range(len(anchors)) if inside[j]]
    if not any(valid):
        return [0 if j in kept else -1 for j in range(len(anchors))]
    if matcher.ignored is not None:
        area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731

        def share(j, region):
            a = anchors[j]
            w, h = (max(min(a[2 + k], region[2 + k]) - max(a[k], region[k]), np.float32(0)) for k in (0, 1))
            return w * h / area(a)

        kept = [j for j in kept if not any(share(j, region) > matcher.ignored for region in regions)]
    real = [i for i in range(len(boxes)) if valid[i]]
    for j in kept:
        best = max(table[i][j] for i in real)
        if best < np.float32(matcher.negative):
            index[j] = 0
        if best >= np.float32(matcher.positive):
            index[j] = 1 + next(i for i in real if table[i][j] == best)
    if matcher.minimum is not None:
        for i in real:
            most = max(table[i][j] for j in kept)
            if most >= np.float32(matcher.minimum):
                for j in kept:
                    if table[i][j] == most:
                        index[j] = i + 1
    return index


@pytest.mark.parametrize(
    "matcher",
    [Matcher(0.5, 0.4), Matcher(0.7, 0.3, minimum=0.3, ignored=0.5), Matcher(0.6, 0.6, minimum=None)],
    ids=["retinanet", "ignored", "plain"],
)
def test_matches_are_those_of_the_loop(matcher):
    rng, images = np.random.default_rng(3), 4
    anchors = some_boxes(rng, 70, 30)
    anchors[:4] = [[2, 2, 18, 18], [3, 2, 19, 18], [2, 3, 18, 19], [90, 90, 95, 95]]
    boxes = np.stack([some_boxes(rng, 6, 30) for _ in range(images)])
    boxes[:, 0] = [5, 5, 12, 12]  # within several anchors of one size: a tie
    boxes[:, 1] = [5, 5, 12, 12]  # the later of two equal objects
    boxes[2, 2] = [200, 200, 210, 210]  # touches nothing
    valid = np.arange(6) < np.asarray([6, 5, 3, 0])[:, None]
    inside = rng.uniform(size=(images, 70)) < 0.9
    regions = np.stack([some_boxes(rng, 2, 30) for _ in range(images)])
    regions[1] = 0  # none

    def run(boxes, valid, inside, regions):
        return matcher(jnp.asarray(anchors), boxes, valid, inside=inside, regions=regions)

    found = jax.jit(jax.vmap(run))(boxes, valid, inside, regions)
    for i in range(images):
        wanted = loop_match(matcher, anchors, boxes[i], valid[i], inside[i], regions[i])
        np.testing.assert_array_equal(found.index[i], wanted)
    assert (np.asarray(found.index[0]) == 2).any() == (matcher.minimum is not None)


def test_best_pairs_are_those_of_a_stable_sort():
    scores = np.random.default_rng(4).integers(0, 9, (50, 4)).astype(np.float32) / 10
    best, anchors, labels = best_pairs(jnp.asarray(scores), 0.05, 30)
    order = np.argsort(-scores.ravel(), kind="stable")[:30]
    np.testing.assert_array_equal(best, scores.ravel()[order])
    np.testing.assert_array_equal(anchors * 4 + labels, order)


def raw_outputs(rng, images=2, classes=3, dtype=np.float32):
    """Return outputs of maps for images of 64 pixels."""
    sizes = [max(64 // stride, 1) for stride in ANCHORS.strides]
    draw = lambda n, last: jnp.asarray(rng.normal(size=(images, n, n, 9 * last)) - 2, dtype)  # noqa: E731
    return Raw([draw(n, classes) for n in sizes], [draw(n, 4) for n in sizes])


def test_padding_objects_changes_nothing():
    rng = np.random.default_rng(5)
    raw, padded = raw_outputs(rng), jnp.asarray([[64, 64], [32, 64]])
    boxes, labels = jnp.asarray(np.stack([some_boxes(rng, 2) for _ in range(2)])), jnp.asarray([[2, 0], [1, 1]])
    valid = jnp.asarray([[True, True], [False, False]])

    @jax.jit
    def run(raw, objects):
        wanted = targets(raw, objects, padded, ANCHORS, MATCHER)
        return wanted, losses(raw, wanted)

    wanted, loss = run(raw, Objects(boxes, labels, valid))
    more = Objects(
        jnp.concatenate([jnp.zeros((2, 1, 4)), boxes, jnp.full((2, 1, 4), jnp.nan)], 1),
        jnp.pad(labels, ((0, 0), (1, 1)), constant_values=9),
        jnp.pad(valid, ((0, 0), (1, 1))),
    )
    chex.assert_trees_all_equal(run(raw, more), (wanted, loss))
    # An image without objects is background as far as it goes, and counts as one.
    assert wanted.count == wanted.positive[0].sum() + 1
    np.testing.assert_array_equal(wanted.labels[1], np.full(wanted.labels.shape[1], 3))
    within = [np.arange(9 * n * n) < 9 * -(-n // 2) * n for n in (8, 4, 2, 1, 1)]
    np.testing.assert_array_equal(wanted.counted[1], np.concatenate(within))
    assert np.isfinite(loss.total)


def test_losses_of_one_anchor_by_hand():
    raw = Raw([jnp.full((1, 1, 1, 18), -50.0)], [jnp.zeros((1, 1, 1, 36))])
    raw.logits[0] = raw.logits[0].at[..., 3].set(1.0)  # anchor 1, class 1
    anchors = Anchors((8,), scales=ANCHORS.scales)
    size = 8 * 4 * 2 ** (1 / 3) / math.sqrt(2)  # anchor 1: ratio .5, the second scale
    box = jnp.asarray([[[-size, -size / 2, size * 1.2, size / 2]]])
    objects, padded = Objects(box, jnp.asarray([[1]]), jnp.asarray([[True]])), jnp.asarray([[8, 8]])
    wanted = jax.jit(lambda raw: targets(raw, objects, padded, anchors, MATCHER))(raw)
    found = jax.jit(losses)(raw, wanted)
    positive = np.flatnonzero(wanted.positive[0])
    assert 1 in positive
    p = 1 / (1 + math.exp(-1))
    others = (len(positive) - 1) * 0.25 * 50  # objects at a probability of e^-50
    np.testing.assert_allclose(found.classes[0] * len(positive), 0.25 * (1 - p) ** 2 * -math.log(p) + others, rtol=1e-5)
    np.testing.assert_allclose(wanted.deltas[0, 1], [0.05, 0, math.log(1.1), 0], atol=1e-6)
    np.testing.assert_allclose(found.boxes[0] * len(positive), np.abs(wanted.deltas).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_planted_objects_are_found(dtype):
    raw = jax.tree.map(jnp.zeros_like, raw_outputs(np.random.default_rng(6), dtype=dtype))
    logits = [level - 9 for level in raw.logits]
    # Row 2, column 3 of the first level, anchor 3 (a square of 32 pixels), class 2; a worse one beside it; a corner.
    logits[0] = logits[0].at[0, 2, 3, 3 * 3 + 2].set(3.0).at[0, 2, 4, 3 * 3 + 2].set(2.0).at[0, 7, 7, 3 * 3].set(1.0)
    deltas = [*raw.deltas]
    deltas[0] = deltas[0].at[0, 2, 3, 3 * 4].set(0.125)
    run = jax.jit(lambda raw, sizes, scales: detections(raw, sizes, scales, candidates=50, limit=5))
    found = run(Raw(logits, deltas), jnp.asarray([[50, 60], [64, 64]]), jnp.asarray([[2, 1], [1, 1.0]]))
    chex.assert_shape([found.boxes, found.scores, found.labels, found.count], [(2, 5, 4), (2, 5), (2, 5), (2,)])
    assert found.boxes.dtype == found.scores.dtype == jnp.float32
    np.testing.assert_array_equal(found.count, [2, 0])
    np.testing.assert_array_equal(found.labels[0], [2, 0, -1, -1, -1])
    np.testing.assert_allclose(found.scores[0, :2], 1 / (1 + np.exp([-3.0, -1])), rtol=1e-6)
    np.testing.assert_allclose(found.boxes[0, 0], [12 / 2, 0, 44 / 2, 32])
    np.testing.assert_allclose(found.boxes[0, 1], [40 / 2, 40, 60 / 2, 50])


def test_the_pyramid_repeats_cells_and_adds_levels():
    for old, new in ((3, 6), (5, 9), (4, 7), (2, 2)):
        x = jnp.arange(old * old, dtype=jnp.float32).reshape(1, old, old, 1)
        cell = np.arange(new) * old // new
        np.testing.assert_array_equal(upsample(x, new, new)[0, :, :, 0], np.asarray(x)[0, :, :, 0][np.ix_(cell, cell)])
    maps = [jax.ShapeDtypeStruct((1, 2**i, 2**i, c), jnp.float32) for i, c in ((5, 4), (4, 6), (3, 8))]

    def levels(**options):
        return jax.eval_shape(lambda maps: FPN([4, 6, 8], 10, **options, rngs=nnx.Rngs(0))(maps), maps)

    assert [x.shape[1] for x in levels(levels=4)] == [32, 16, 8, 4]
    assert [x.shape[1] for x in levels(start_level=1, levels=5, extra="on_input")] == [16, 8, 4, 2, 1]
    with pytest.raises(UserError, match="levels=2"):
        levels(levels=2)


def retinanet(backbone="evmamba_t", **options):
    """Return a RetinaNet; options that are not of its head are the backbone's."""
    own = {name: options.pop(name) for name in ("num_classes", "width", "dtype", "pretrained") if name in options}
    return create_detector("retinanet", backbone=backbone, backbone_options=options, **own)


def abstract_detector(**options):
    return nnx.eval_shape(lambda: retinanet(**options))


def test_official_names_and_size_of_the_paper():
    model = abstract_detector(backbone="evmamba_t")
    shapes = manifest(model)
    for name, shape in {
        "backbone.layers.0.blocks.0.op.in_proj.weight": (192, 48),
        "backbone.outnorm3.bias": (384,),
        "neck.lateral_convs.0.conv.weight": (256, 96, 1, 1),
        "neck.fpn_convs.2.conv.weight": (256, 256, 3, 3),
        "neck.fpn_convs.3.conv.weight": (256, 384, 3, 3),
        "neck.fpn_convs.4.conv.bias": (256,),
        "bbox_head.cls_convs.3.conv.weight": (256, 256, 3, 3),
        "bbox_head.reg_convs.0.conv.bias": (256,),
        "bbox_head.retina_cls.weight": (720, 256, 3, 3),
        "bbox_head.retina_reg.bias": (36,),
    }.items():
        assert shapes[name] == shape
    assert not any("lateral_convs.3" in name or "fpn_convs.5" in name for name in shapes)
    trained = sum(math.prod(shape) for name, shape in shapes.items() if "running" not in name)
    assert round(trained / 1e6, 2) == 15.99


def test_weights_go_both_ways_and_come_from_files(tmp_path):
    model = retinanet(**SMALL)
    given = weights(manifest(model))
    from_torch(model, given)
    back = to_torch(model)
    assert {name for name in back if "num_batches" not in name} == given.keys()
    chex.assert_trees_all_equal({name: back[name] for name in given}, given)

    save_pth(tmp_path / "detector.pth", {"state_dict": {f"module.module.{name}": a for name, a in given.items()}})
    again = retinanet(**SMALL, pretrained=tmp_path / "detector.pth")
    chex.assert_trees_all_equal(to_torch(again), back)
    with pytest.raises(UserError, match=r"retina_cls.* of another|of another shape: 'bbox_head.retina_cls"):
        retinanet(**{**SMALL, "num_classes": 4}, pretrained=tmp_path / "detector.pth")

    options = {name: SMALL[name] for name in ("depths", "d_state")}
    classifier = weights(manifest(abstract_model("evmamba_t", **options)))
    save_pth(tmp_path / "classifier.pth", {"model": classifier})
    started = to_torch(retinanet(**SMALL, pretrained=tmp_path / "classifier.pth"))
    name = "layers.2.1.conv_dw.0.weight"
    np.testing.assert_array_equal(started[f"backbone.{name}"], classifier[name])
    np.testing.assert_array_equal(started["backbone.outnorm2.weight"], np.ones(192))
    np.testing.assert_allclose(started["bbox_head.retina_cls.bias"], np.full(27, -math.log(99)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_detector_has_losses_and_detections_of_fixed_shapes(dtype):
    model = retinanet(**SMALL, dtype=dtype)
    images = jnp.asarray(np.random.default_rng(7).normal(size=(2, 64, 96, 3)), jnp.float32)
    objects = Objects(jnp.asarray([[[8, 8, 40, 40.0]]] * 2), jnp.asarray([[1], [0]]), jnp.asarray([[True], [False]]))

    @jax.jit
    def run(model, images):
        return model.detect(images, limit=7), model.loss(images, objects), model(images)

    found, loss, raw = run(model, images) if dtype else jax.eval_shape(run, model, images)
    chex.assert_shape([found.boxes, found.scores, found.labels, found.count], [(2, 7, 4), (2, 7), (2, 7), (2,)])
    assert {found.boxes.dtype, found.scores.dtype, loss.classes.dtype, loss.boxes.dtype} == {jnp.dtype(jnp.float32)}
    assert [level.shape[1:3] for level in raw.logits] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert raw.logits[0].dtype == (dtype or jnp.float32)
    if dtype:
        # Every class starts at a probability of .01, of all anchors: 10 to 20 times the loss of a trained detector.
        assert 0 < float(loss.total) < 100
        np.testing.assert_array_equal(found.count, [0, 0])


@pytest.mark.parametrize("backbone", ["vmamba_t", "msvmamba_n", "mambavision_t", "vim_t"])
def test_every_family_gives_its_maps(backbone):
    blocks = {"depth": 4} if backbone == "vim_t" else {"depths": (1, 1, 1, 2)}
    model = abstract_detector(backbone=backbone, num_classes=5, width=32, **blocks)
    raw = jax.eval_shape(lambda model, images: model(images), model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert [level.shape for level in raw.logits] == [(1, n, n, 45) for n in (8, 4, 2, 1, 1)]


def test_mistakes_are_one_line():
    for options, message in (
        ({"backbone": "evmamba_q"}, "did you mean 'evmamba_"),
        ({"backbone": "evmamba_t", "num_classes": 0}, "num_classes=0"),
        ({"backbone": "evmamba_t", "width": 2.5}, "width=2.5"),
        ({"backbone": "evmamba_t", "out_norms": False}, "'out_norms'"),
        ({"backbone": "evmamba_t", "depth": 3}, "did you mean 'depths'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            retinanet(**options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'retinanet'"):
        create_detector("retina", backbone="evmamba_t")
    model = abstract_detector(**SMALL)
    with pytest.raises(UserError, match="60x64"):
        jax.eval_shape(lambda model, x: model(x), model, jax.ShapeDtypeStruct((1, 60, 64, 3), jnp.float32))
