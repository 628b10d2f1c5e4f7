"""Mask R-CNN on given maps, as recorded in ``maskrcnn``: every stage, loss, gradient, detection and mask."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from official_weights import image
from recorded_cases import Compared, discrete
from recorded_detection_ops import Mask
from recorded_retinanet import (
    GivenMaps,
    Recorded,
    channels_first,
    compare_gradients,
    compare_targets,
    fill_recorded,
    padded_objects,
)

from evmamba_jax.arrays import merge, split
from evmamba_jax.detection import mask_rcnn
from evmamba_jax.detection import proposals as rpn
from evmamba_jax.detection.mask_rcnn import ANCHORS, BOX_SIZE, STRIDES, Features, MaskRCNN, Settings
from evmamba_jax.detection.masks import paste
from evmamba_jax.detection.matching import Objects
from evmamba_jax.detection.proposals import Limits, proposals
from evmamba_jax.detection.regions import extract
from evmamba_jax.detection.sampling import Chosen, Sampler

KINDS_OF_LOSSES = {
    "loss_rpn_cls": "rpn_classes",
    "loss_rpn_bbox": "rpn_boxes",
    "loss_cls": "classes",
    "loss_bbox": "boxes",
    "loss_mask": "masks",
}


def detector(doc: Mapping[str, Any], objects: int) -> MaskRCNN:
    """Return the recorded detector, without weights, that drops no region and has masks of 20 an image at most."""
    config = doc["config_used"]
    head = config["roi_head"]["bbox_head"]
    limits = [
        Limits(one["nms_pre"], one["max_per_img"])
        for one in (config["train_cfg"]["rpn_proposal"], config["test_cfg"]["rpn"])
    ]
    settings = Settings(regions=Sampler(objects + limits[0].total, 20), trained=limits[0], tested=limits[1])

    def build() -> MaskRCNN:
        widths = [one["shape"][1] for one in doc["input_maps"]]
        width = config["neck"]["out_channels"]
        sizes = {"width": width, "fc_width": head["fc_out_channels"], "settings": settings}
        return MaskRCNN(GivenMaps(), widths, None, head["num_classes"], **sizes, rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


def with_masks(recorded: Recorded, objects: Objects) -> Objects:
    """Return objects with the recorded masks."""
    images, most = objects.labels.shape
    masks = [recorded[f"in/masks_{i}"] for i in range(images)]
    padded = [np.pad(own, ((0, most - len(own)), (0, 0), (0, 0))) for own in masks]
    return objects._replace(masks=jnp.asarray(np.stack(padded)))


def chosen(recorded: Recorded, place: str, shape: tuple[int, int], slots: list[np.ndarray]) -> Chosen:
    """Return what was drawn of (B, N), where ``slots`` has the place in N of each recorded index of an image."""
    masks = np.zeros((2, *shape), bool)
    for i, own in enumerate(slots):
        for kind, name in enumerate(("pos_inds", "neg_inds")):
            masks[kind, i, own[recorded[f"{place}/{name}_{i}"]]] = True
    return Chosen(*jnp.asarray(masks))


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    recorded = Recorded(folder, "maskrcnn", x64)
    doc, dtype = recorded.doc, np.float64 if x64 else np.float32
    objects = with_masks(recorded, padded_objects(recorded, len(doc["images"]), dtype))
    model = detector(doc, objects.labels.shape[1])
    rows = mask_rcnn.head_rows(model)
    yield fill_recorded("maskrcnn names", doc, model, rows, dtype)
    structure, params, _ = split(model)
    maps = [jnp.asarray(image(one["shape"], one["seed"]), dtype) for one in doc["input_maps"]]
    padded, sizes = (jnp.asarray([one[name] for one in doc["images"]]) for name in ("pad_shape", "img_shape"))

    @jax.jit
    def begin(params):
        features = merge(structure, params, {}).outputs(maps)
        train, test = (
            proposals(features.raw, sizes, ANCHORS, limits)
            for limits in (model.settings.trained, model.settings.tested)
        )
        return features, rpn.targets(features.raw, objects, padded, ANCHORS), train, test

    features, everything, train, test = begin(params)
    for number, level in enumerate(features.levels, 2):
        yield from recorded.near("maskrcnn pyramid", f"fpn/p{number}", channels_first(level))
    for kind, outputs in (("cls", features.raw.logits), ("reg", features.raw.deltas)):
        for number, level in enumerate(outputs):
            yield from recorded.near("maskrcnn proposals", f"rpn/{kind}_{number}", channels_first(level))
    for name, ours in (("train", train), ("test", test)):
        for i, count in enumerate(ours.valid.sum(1)):
            place = f"rpn/{name}_proposals"
            yield from recorded.near("maskrcnn proposals", f"{place}/boxes_{i}", ours.boxes[i, :count])
            yield from recorded.near("maskrcnn proposals", f"{place}/scores_{i}", ours.scores[i, :count])
    whole = everything.only(everything.positive, everything.negative)
    case = "maskrcnn anchors"
    yield from compare_targets(recorded, case, "rpn/targets", ANCHORS, features.raw, whole, padded)

    anchor_slots = [np.flatnonzero(np.concatenate(ANCHORS.inside(features.raw.sizes, one))) for one in padded]
    # Behind the objects of an image come rows of padding, then its proposals.
    most = objects.labels.shape[1]
    counts = np.asarray(objects.valid.sum(1))
    slots = [np.r_[:count, most : most + train.boxes.shape[1]] for count in counts]

    @jax.jit
    def train_step(params, maps, anchors, regions):
        def total(params, maps):
            model = merge(structure, params, {})
            features = model.outputs(maps)
            wanted = model.wanted(features, objects, padded, sizes, lambda *_: anchors, lambda *_: regions)
            losses = model.losses(features, objects, wanted)
            rows = slice(model.settings.regions.positives)
            targets = (
                mask_rcnn.box_targets(wanted.regions, objects),
                mask_rcnn.region_masks(wanted.regions, objects, rows, 28),
            )
            logits, _ = model.of_boxes(features.levels, wanted.regions.boxes)
            return losses.total, (wanted.regions, losses, targets, logits)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, maps)

    for place in ("keep_all", "sampled"):
        shape = everything.labels.shape
        anchors = chosen(recorded, f"{place}/rpn", shape, anchor_slots)
        regions = chosen(recorded, f"{place}/stage0", (shape[0], most + train.boxes.shape[1]), slots)
        if x64 and place == "keep_all":
            for name in ("positive", "negative"):
                ours, wanted = getattr(everything, name), getattr(anchors, name)
                yield discrete(f"maskrcnn {place}", f"{name} anchors", ours, wanted)
        (total, (found, losses, targets, logits)), (of_params, of_maps) = train_step(params, maps, anchors, regions)
        yield from compare_regions(recorded, place, found, targets, logits)
        for name, ours in KINDS_OF_LOSSES.items():
            loss = np.atleast_1d(getattr(losses, ours))
            yield from recorded.near(f"maskrcnn {place}", f"{place}/loss/{name}", loss)
        yield from recorded.near(f"maskrcnn {place}", f"{place}/loss/total", total)
        case = f"maskrcnn {place} gradients"
        yield from compare_gradients(recorded, case, f"{place}/", rows, of_params, of_maps)
    yield from compare_candidates(recorded, objects, train, slots)
    yield from compare_test(recorded, model, features, test)


def compare_candidates(recorded: Recorded, objects: Objects, train: Any, slots: list) -> Iterator[Compared]:
    """Yield the differences of which candidates are for which objects, where all were taken."""
    found = jax.jit(mask_rcnn.candidates, static_argnums=3)(objects, train.boxes, train.valid, mask_rcnn.MATCHER)
    for i, own in enumerate(slots if recorded.x64 else []):
        index = np.asarray(found.index[i])[own]
        case = "maskrcnn keep_all"
        for name, ours in {
            "pos_inds": np.flatnonzero(index > 0),
            "neg_inds": np.flatnonzero(index == 0),
            "pos_gt": index[index > 0] - 1,
        }.items():
            yield discrete(case, f"{name} of image {i}", ours, recorded[f"keep_all/stage0/{name}_{i}"])


def compare_regions(recorded: Recorded, place: str, found: Any, targets: Any, logits: jax.Array) -> Iterator[Compared]:
    """Yield the differences of regions and what they are trained for."""
    case, stage = f"maskrcnn {place}", f"{place}/stage0"
    valid, positive = np.asarray(found.valid), np.asarray(found.positive)
    boxes, masks = (np.asarray(one) for one in targets)
    yield from recorded.near(case, f"{stage}/box_targets", boxes[positive])
    for i, own in enumerate(valid):
        yield from recorded.near(case, f"{stage}/boxes_{i}", found.boxes[i][own])
    right = np.asarray(logits.argmax(-1) == found.labels)[valid].mean(keepdims=True) * 100
    yield from recorded.near(case, f"{place}/loss/acc", right)
    if not recorded.x64:
        return
    yield discrete(case, "labels", np.asarray(found.labels)[valid], recorded[f"{stage}/labels"])
    yield discrete(case, "mask targets", masks[positive[:, : masks.shape[1]]], recorded[f"{stage}/mask_targets"])
    for i, own in enumerate(positive):
        yield discrete(case, f"objects of image {i}", found.number[i][own], recorded[f"{stage}/pos_gt_{i}"])
        yield discrete(case, f"added of image {i}", found.added[i][own], recorded[f"{stage}/first_are_gt_{i}"])


def compare_test(recorded: Recorded, model: MaskRCNN, features: Features, test: Any) -> Iterator[Compared]:
    """Yield the differences of heads, detections and masks."""
    doc = recorded.doc
    config = doc["config_used"]["test_cfg"]["rcnn"]
    images = doc["images"]
    structure, params, _ = split(model)
    scales = jnp.asarray([one["scale_factor"] for one in images], test.boxes.dtype)
    sizes = jnp.asarray([one["img_shape"] for one in images])

    @jax.jit
    def find(params, scales):
        model = merge(structure, params, {})
        held = jax.vmap(lambda levels, boxes: extract(levels, boxes, STRIDES[:4], BOX_SIZE))
        options = {"limit": config["max_per_img"], "iou_threshold": config["nms"]["iou_threshold"]}
        options["score_threshold"] = config["score_thr"]
        found = model.detections(features, test, sizes, scales, **options)
        return held(features.levels[:4], test.boxes), model.of_boxes(features.levels, test.boxes), found

    held, (scores, deltas), final = find(params, jnp.ones_like(scales))
    *_, rescaled = find(params, scales)
    there = np.asarray(test.valid)
    case = "maskrcnn heads"
    yield from recorded.near(case, "test/roi_feats", channels_first(np.asarray(held)[there]), 1e-8)
    yield from recorded.near(case, "test/cls_score", np.asarray(scores)[there], 1e-8)
    yield from recorded.near(case, "test/bbox_pred", np.asarray(deltas)[there].reshape(there.sum(), -1), 1e-8)
    valid = np.arange(final.labels.shape[1]) < np.asarray(final.count)[:, None]
    masks = np.asarray(final.masks)[valid]
    yield from recorded.near(case, "test/mask_logits_0", np.log(masks / (1 - masks)), 1e-8)
    for place, found, canvas in (("test/final", final, "img_shape"), ("test/rescaled", rescaled, "ori_shape")):
        case = f"maskrcnn {place}"
        for i, count in enumerate(np.asarray(found.count)):
            boxes, masks = np.asarray(found.boxes[i, :count]), np.asarray(found.masks[i, :count])
            yield from recorded.near(case, f"{place}/boxes_{i}", boxes, 1e-8)
            yield from recorded.near(case, f"{place}/scores_{i}", found.scores[i, :count], 1e-8)
            if recorded.x64:
                yield discrete(case, f"labels of image {i}", found.labels[i, :count], recorded[f"{place}/labels_{i}"])
                above = paste(masks, boxes, *images[i][canvas]) - config["mask_thr_binary"]
                wanted = recorded[f"{place}/masks_{i}"]
                yield Mask(above >= 0, above).compared(case, f"masks of image {i}", wanted)
