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
from evmamba_jax.detection.boxes import within
from evmamba_jax.detection.mask_rcnn import MaskRCNN
from evmamba_jax.detection.masks import paste
from evmamba_jax.detection.matching import Objects
from evmamba_jax.detection.proposals import Limits
from evmamba_jax.detection.rcnn import ANCHORS, BOX_SIZE, RCNN, STRIDES, Features, Settings
from evmamba_jax.detection.regions import extract
from evmamba_jax.detection.sampling import Chosen, Sampler


def detector(doc: Mapping[str, Any], kind: type[RCNN], objects: int) -> RCNN:
    """Return the recorded detector, without weights, that drops no region and has masks of 20 an image at most."""
    config = doc["config_used"]
    head, test = config["roi_head"], config["test_cfg"]
    head = head["bbox_head"][0] if isinstance(head["bbox_head"], list) else head["bbox_head"]
    limits = [Limits(one["nms_pre"], one["max_per_img"]) for one in (config["train_cfg"]["rpn_proposal"], test["rpn"])]
    settings = Settings(regions=Sampler(objects + limits[0].total, 20), trained=limits[0], tested=limits[1])

    def build() -> RCNN:
        widths = [one["shape"][1] for one in doc["input_maps"]]
        width = config["neck"]["out_channels"]
        sizes = {"width": width, "fc_width": head["fc_out_channels"], "settings": settings}
        return kind(GivenMaps(), widths, None, head["num_classes"], **sizes, rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


def with_masks(recorded: Recorded, objects: Objects) -> Objects:
    """Return objects with the recorded masks."""
    images, most = objects.labels.shape
    masks = [recorded[f"in/masks_{i}"] for i in range(images)]
    padded = [np.pad(own, ((0, most - len(own)), (0, 0), (0, 0))) for own in masks]
    return objects._replace(masks=jnp.asarray(np.stack(padded)))


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    yield from compare_rcnn(folder, "maskrcnn", MaskRCNN, ("keep_all", "sampled"), x64)


def compare_rcnn(folder: Path, name: str, kind: type[RCNN], places: tuple[str, ...], x64: bool) -> Iterator[Compared]:
    """Yield every difference of a kind of detector, in training of what is recorded at these places."""
    recorded = Recorded(folder, name, x64)
    doc, dtype = recorded.doc, np.float64 if x64 else np.float32
    objects = with_masks(recorded, padded_objects(recorded, len(doc["images"]), dtype))
    model = detector(doc, kind, objects.labels.shape[1])
    rows = mask_rcnn.head_rows(model)
    yield fill_recorded(f"{name} names", doc, model, rows, dtype)
    model.eval()
    structure, params, stats = split(model)
    maps = [jnp.asarray(image(one["shape"], one["seed"]), dtype) for one in doc["input_maps"]]
    padded, sizes = (jnp.asarray([one[name] for one in doc["images"]]) for name in ("pad_shape", "img_shape"))

    @jax.jit
    def begin(params):
        features = merge(structure, params, stats).outputs(maps)
        train, test = (
            model.proposals(features, sizes, limits) for limits in (model.settings.trained, model.settings.tested)
        )
        anchors = rpn.targets(features.raw, objects, padded, sizes, ANCHORS, model.rules)
        return features, anchors, train, test

    features, everything, train, test = begin(params)
    for number, level in enumerate(features.levels, 2):
        yield from recorded.near(f"{name} pyramid", f"fpn/p{number}", channels_first(level))
    for part, outputs in (("cls", features.raw.logits), ("reg", features.raw.deltas)):
        for number, level in enumerate(outputs):
            yield from recorded.near(f"{name} proposals", f"rpn/{part}_{number}", channels_first(level))
    for moment, ours in (("train", train), ("test", test)):
        for i, count in enumerate(ours.valid.sum(1)):
            place = f"rpn/{moment}_proposals"
            yield from recorded.near(f"{name} proposals", f"{place}/boxes_{i}", ours.boxes[i, :count])
            yield from recorded.near(f"{name} proposals", f"{place}/scores_{i}", ours.scores[i, :count])
    whole = everything.only(everything.positive, everything.negative)
    yield from compare_targets(recorded, f"{name} anchors", "rpn/targets", ANCHORS, features.raw, whole, padded)

    boxes = np.concatenate(ANCHORS.boxes(features.raw.sizes, dtype))
    inside = [np.concatenate(ANCHORS.inside(features.raw.sizes, one)) for one in padded]
    if model.rules.trained == "within":
        inside = [own & np.asarray(within(boxes, size)) for own, size in zip(inside, sizes, strict=True)]
    slots = [np.flatnonzero(own) for own in inside]
    steps: dict[bool, Any] = {}
    for place in places:
        taken = [recorded_masks(recorded, f"{place}/rpn", i, len(boxes), slots[i]) for i in range(len(slots))]
        anchors = Chosen(*(jnp.asarray(np.stack(kind)) for kind in zip(*taken, strict=True)))
        if x64 and place == places[0]:
            for sign in ("positive", "negative"):
                yield discrete(f"{name} {place}", f"{sign} anchors", getattr(everything, sign), getattr(anchors, sign))
        moment = not place.endswith("bn_eval")
        step = steps.setdefault(moment, train_step(model, objects, (padded, sizes), moment))
        yield from compare_training(recorded, name, place, model, rows, maps, objects, step, anchors)
    yield from compare_test(recorded, name, model, features, test)


def recorded_masks(recorded: Recorded, place: str, image: int, length: int, slots: np.ndarray) -> np.ndarray:
    """Return which of so many were drawn (2, length): positive and negative ones.

    Args:
        recorded: the file.
        place: where it has the drawn indices.
        image: number of the image.
        length: of what was drawn from.
        slots: the place in it of each index that was recorded.
    """
    masks = np.zeros((2, length), bool)
    for kind, name in enumerate(("pos_inds", "neg_inds")):
        masks[kind, slots[recorded[f"{place}/{name}_{image}"]]] = True
    return masks


def train_step(model: RCNN, objects: Objects, sizes: tuple[jax.Array, jax.Array], batch_statistics: bool) -> Any:
    """Return the compiled step: of parameters, maps and what was drawn the loss with its parts, and the gradients."""
    twin = merge(*split(model))
    if batch_statistics:
        twin.train()
    structure, _, stats = split(twin)

    @jax.jit
    def step(params, maps, anchors, drawn):
        def total(params, maps):
            offered = []

            def recorded_ones(one: Chosen) -> Any:
                def choose(positive, negative):
                    offered.append(Chosen(positive, negative))
                    return one

                return choose

            twin = merge(structure, params, stats)
            by = [recorded_ones(one) for one in drawn]
            losses, rounds = twin.trained(twin.outputs(maps), objects, *sizes, lambda *_: anchors, by)
            return losses.total, (losses, rounds, offered)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, maps)

    return step


def compare_training(
    recorded: Recorded,
    name: str,
    place: str,
    model: RCNN,
    rows: Any,
    maps: list[jax.Array],
    objects: Objects,
    step: Any,
    anchors: Chosen,
) -> Iterator[Compared]:
    """Yield the differences of losses, gradients and what every round is trained with."""
    case, count = f"{name} {place}", len(model.rounds)
    (images, most), settings = objects.labels.shape, model.settings
    # Behind the objects of an image come rows of padding, then its proposals; later rounds have the regions of the one
    # before in their place, of which the official code has taken the objects and padding out.
    counts = np.asarray(objects.valid.sum(1))
    kept = [np.arange(settings.trained.total)] * images
    drawn = []
    for number in range(count):
        stage = f"{place}/stage{number}"
        length = most + (settings.regions.count if number else settings.trained.total)
        slots = [np.r_[np.arange(own), most + rest] for own, rest in zip(counts, kept, strict=True)]
        taken = [recorded_masks(recorded, stage, i, length, slots[i]) for i in range(images)]
        drawn.append(Chosen(*(jnp.asarray(np.stack(kind)) for kind in zip(*taken, strict=True))))
        added = [recorded[f"{stage}/first_are_gt_{i}"].astype(bool) for i in range(images)]
        kept = [
            np.flatnonzero(~np.pad(one, (0, len(recorded[f"{stage}/boxes_{i}"]) - len(one))))
            for i, one in enumerate(added)
        ]
    (total, (losses, rounds, offered)), (of_params, of_maps) = step(split(model).params, maps, anchors, drawn)
    for number, (ours, wanted) in enumerate(zip(offered, drawn, strict=True)):
        for sign in Chosen._fields if recorded.x64 and place.startswith("keep_all") else ():
            yield discrete(case, f"{sign} candidates of round {number}", getattr(ours, sign), getattr(wanted, sign))
    for part, ours in (("loss_rpn_cls", losses.rpn_classes), ("loss_rpn_bbox", losses.rpn_boxes), ("total", total)):
        yield from recorded.near(case, f"{place}/loss/{part}", ours)
    for number, one in enumerate(rounds):
        stage = f"{place}/loss/s{number}." if count > 1 else f"{place}/loss/"
        for part, ours in (("cls", losses.classes), ("bbox", losses.boxes), ("mask", losses.masks)):
            yield from recorded.near(case, f"{stage}loss_{part}", ours[number : number + 1])
        valid = np.asarray(one.regions.valid)
        right = np.asarray(one.logits.argmax(-1) == one.regions.labels)[valid].mean(keepdims=True) * 100
        yield from recorded.near(case, f"{stage}acc", right)
        yield from compare_regions(recorded, case, f"{place}/stage{number}", model.rounds[number], one)
    yield from compare_gradients(recorded, f"{case} gradients", f"{place}/", rows, of_params, of_maps)


def compare_regions(recorded: Recorded, case: str, stage: str, one: Any, trained: Any) -> Iterator[Compared]:
    """Yield the differences of regions and what they are trained for."""
    found = trained.regions
    valid, positive = np.asarray(found.valid), np.asarray(found.positive)
    wanted = trained.boxes if one.giou else one.coder.encode(found.boxes, trained.boxes)
    yield from recorded.near(case, f"{stage}/box_targets", np.asarray(wanted)[positive])
    for i, own in enumerate(valid):
        yield from recorded.near(case, f"{stage}/boxes_{i}", found.boxes[i][own])
    if not recorded.x64:
        return
    yield discrete(case, f"labels of {stage}", np.asarray(found.labels)[valid], recorded[f"{stage}/labels"])
    masks = np.asarray(trained.masks)
    masks = masks[positive[:, : masks.shape[1]]]
    yield discrete(case, f"mask targets of {stage}", masks, recorded[f"{stage}/mask_targets"])
    for i, own in enumerate(positive):
        yield discrete(case, f"{stage}/pos_gt_{i}", found.number[i][own], recorded[f"{stage}/pos_gt_{i}"])
        yield discrete(case, f"{stage}/first_are_gt_{i}", found.added[i][own], recorded[f"{stage}/first_are_gt_{i}"])


def compare_test(recorded: Recorded, name: str, model: RCNN, features: Features, test: Any) -> Iterator[Compared]:
    """Yield the differences of heads, detections and masks."""
    doc = recorded.doc
    config = doc["config_used"]["test_cfg"]["rcnn"]
    images, count = doc["images"], len(model.rounds)
    structure, params, stats = split(model)
    scales = jnp.asarray([one["scale_factor"] for one in images], test.boxes.dtype)
    sizes = jnp.asarray([one["img_shape"] for one in images])

    @jax.jit
    def find(params, scales):
        model = merge(structure, params, stats)
        options = {"limit": config["max_per_img"], "iou_threshold": config["nms"]["iou_threshold"]}
        found = model.detections(features, test, sizes, scales, **options, score_threshold=config["score_thr"])
        rounds = model.rounds_of(features, test, sizes)
        of_regions = [extract(features.levels[:4], boxes, STRIDES[:4], BOX_SIZE) for boxes, *_ in rounds]
        # Without factors the boxes are those that the masks are of.
        masks = [model.of_masks(i, features.levels, found.boxes, jnp.maximum(found.labels, 0)) for i in range(count)]
        return found, rounds, of_regions, masks

    final, rounds, of_regions, masks = find(params, jnp.ones_like(scales))
    rescaled, *_ = find(params, scales)
    there = np.asarray(test.valid)
    case = f"{name} heads"
    for number, ((boxes, logits, deltas), held) in enumerate(zip(rounds, of_regions, strict=True)):
        place = f"test/stage{number}" if count > 1 else "test"
        if count > 1:
            index = np.broadcast_to(np.arange(len(images))[:, None], there.shape)
            yield from recorded.near(case, f"{place}/rois", np.c_[index[there], np.asarray(boxes)[there]], 1e-8)
        yield from recorded.near(case, f"{place}/roi_feats", channels_first(np.asarray(held)[there]), 1e-8)
        yield from recorded.near(case, f"{place}/cls_score", np.asarray(logits)[there], 1e-8)
        yield from recorded.near(case, f"{place}/bbox_pred", np.asarray(deltas)[there].reshape(there.sum(), -1), 1e-8)
    valid = np.arange(final.labels.shape[1]) < np.asarray(final.count)[:, None]
    for number, logits in enumerate(masks):
        yield from recorded.near(case, f"test/mask_logits_{number}", np.asarray(logits)[valid], 1e-8)
    for place, found, canvas in (("test/final", final, "img_shape"), ("test/rescaled", rescaled, "ori_shape")):
        case = f"{name} {place}"
        for i, own in enumerate(np.asarray(found.count)):
            boxes, masks = np.asarray(found.boxes[i, :own]), np.asarray(found.masks[i, :own])
            yield from recorded.near(case, f"{place}/boxes_{i}", boxes, 1e-8)
            yield from recorded.near(case, f"{place}/scores_{i}", found.scores[i, :own], 1e-8)
            if recorded.x64:
                yield discrete(case, f"labels of image {i}", found.labels[i, :own], recorded[f"{place}/labels_{i}"])
                above = paste(masks, boxes, *images[i][canvas]) - config["mask_thr_binary"]
                wanted = recorded[f"{place}/masks_{i}"]
                yield Mask(above >= 0, above).compared(case, f"masks of image {i}", wanted)
