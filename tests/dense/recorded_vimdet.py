"""Vim's detector on a given map, as recorded in ``vimdet``: every stage, loss, gradient, detection and mask.

Of training float64 alone: in float32 the official code matches other anchors of those that fit an object as well.
"""

import re
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
from recorded_maskrcnn import with_masks
from recorded_retinanet import (
    GivenMaps,
    Recorded,
    channels_first,
    compare_gradients,
    fill_recorded,
    padded_objects,
)

from evmamba_jax.arrays import merge, split
from evmamba_jax.detection import vim_cascade
from evmamba_jax.detection.masks import paste
from evmamba_jax.detection.matching import Objects
from evmamba_jax.detection.proposals import Limits
from evmamba_jax.detection.rcnn import Features, Settings
from evmamba_jax.detection.sampling import Chosen, Sampler
from evmamba_jax.detection.vim_cascade import VimCascade
from evmamba_jax.heads.simple_pyramid import SimplePyramid

CASE = "vimdet"


def number(text: str, name: str, official: int, which: int = 0) -> int:
    """Return a number that a text has behind a name, where it has several ``which`` of them, else the official one."""
    found = re.search(rf"{name} (\d+)(?: / (\d+))?", text)
    return official if found is None else int(found[which + 1])


def detector(doc: Mapping[str, Any], objects: int) -> VimCascade:
    """Return the recorded detector, without weights, that drops no region."""
    changed, shapes = doc["changed"], {name: shape for name, (shape, *_) in doc["state_dict"].items()}
    limits = [
        Limits(number(changed["rpn"], "pre_nms_topk", pre, i), number(changed["rpn"], "post_nms_topk", 1000, i))
        for i, pre in enumerate((2000, 1000))
    ]
    count = number(changed["rpn"], "batch_size_per_image", 256)
    regions = objects + limits[0].total
    settings = Settings(Sampler(count, count // 2), Sampler(regions, regions), *limits)
    width, (fc_width, _) = shapes["backbone.simfp_2.5.weight"][0], shapes["roi_heads.box_head.0.fc1.weight"]
    classes = shapes["roi_heads.box_predictor.0.cls_score.weight"][0] - 1
    stride = doc["canvas"][0] // doc["input_maps"][0]["shape"][2]

    def build() -> VimCascade:
        rngs = nnx.Rngs(0)
        c = doc["input_maps"][0]["shape"][1]
        pyramid = SimplePyramid(c, stride, width=width, rngs=rngs)
        sizes = {"width": width, "fc_width": fc_width, "anchors": vim_cascade.anchors_of(), "settings": settings}
        return VimCascade(GivenMaps(), [c], pyramid, classes, **sizes, rngs=rngs)

    return nnx.eval_shape(build)


def on_canvas(recorded: Recorded, objects: Objects) -> Objects:
    """Return objects with the recorded masks, which end with the image, on the batch's canvas."""
    height, width = recorded.doc["canvas"]
    arrays = {}
    for i in range(len(recorded.doc["images"])):
        own = recorded[f"in/masks_{i}"]
        arrays[f"in/masks_{i}"] = np.pad(own, ((0, 0), (0, height - own.shape[1]), (0, width - own.shape[2])))
    return with_masks(arrays, objects)


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    recorded = Recorded(folder, CASE, x64)
    doc, dtype = recorded.doc, np.float64 if x64 else np.float32
    objects = on_canvas(recorded, padded_objects(recorded, len(doc["images"]), dtype))
    model = detector(doc, objects.labels.shape[1])
    rows = vim_cascade.head_rows(model)
    yield fill_recorded(f"{CASE} names", doc, model, rows, dtype)
    model.eval()
    structure, params, stats = split(model)
    maps = [jnp.asarray(image(one["shape"], one["seed"]), dtype) for one in doc["input_maps"]]
    sizes = jnp.asarray([one["img"] for one in doc["images"]])

    @jax.jit
    def begin(params, maps):
        model = merge(structure, params, stats)
        features = model.outputs(model.pyramid(maps))
        return features, *(
            model.proposals(features, sizes, limits) for limits in (model.settings.trained, model.settings.tested)
        )

    features, trained, tested = begin(params, maps)
    for level, array in enumerate(features.levels, 2):
        yield from recorded.near(f"{CASE} pyramid", f"pyramid/p{level}", channels_first(array))
    for part, outputs in (("logits", features.raw.logits), ("deltas", features.raw.deltas)):
        for level, array in enumerate(outputs):
            yield from recorded.near(f"{CASE} proposals", f"rpn/{part}_{level}", channels_first(array))
    for moment, found in (("train", trained), ("test", tested)):
        for i, count in enumerate(found.valid.sum(1)):
            place = f"{moment}/proposals"
            yield from recorded.near(f"{CASE} proposals", f"{place}/boxes_{i}", found.boxes[i, :count])
            if f"{place}/logits_{i}" in doc["arrays"]:
                scores = np.asarray(found.scores[i, :count], float)
                yield from recorded.near(f"{CASE} proposals", f"{place}/logits_{i}", np.log(scores / (1 - scores)))
    if x64:
        yield from compare_training(recorded, model, rows, maps, objects, sizes)
    yield from compare_test(recorded, model, features, tested, sizes)


def compare_training(
    recorded: Recorded, model: VimCascade, rows: Any, maps: list[jax.Array], objects: Objects, sizes: jax.Array
) -> Iterator[Compared]:
    """Yield the differences of losses and gradients where nothing is dropped."""
    structure, params, stats = split(model)

    @jax.jit
    def step(params, maps):
        def total(params, maps):
            model = merge(structure, params, stats)
            features = model.outputs(model.pyramid(maps))
            choose = Chosen, [Chosen] * len(model.rounds)  # all
            losses, _ = model.trained(features, objects, sizes, sizes, *choose)
            return losses.total, losses

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, maps)

    (total, losses), (of_params, of_maps) = step(params, maps)
    ours = {"rpn_cls": losses.rpn_classes.sum(), "rpn_loc": losses.rpn_boxes.sum(), "mask": losses.masks.sum()}
    for i, (classes, boxes) in enumerate(zip(losses.classes, losses.boxes, strict=True)):
        ours |= {f"cls_stage{i}": classes, f"box_reg_stage{i}": boxes}
    for name, loss in ours.items():
        yield from recorded.near(f"{CASE} losses", f"train/loss/loss_{name}", loss)
    yield from recorded.near(f"{CASE} losses", "train/loss/total", total)
    yield from compare_gradients(recorded, f"{CASE} gradients", "train/", rows, of_params, of_maps)


def compare_test(
    recorded: Recorded, model: VimCascade, features: Features, tested: Any, sizes: jax.Array
) -> Iterator[Compared]:
    """Yield the differences of rounds, detections and masks."""
    images, limit = recorded.doc["images"], number(recorded.doc["changed"]["roi_heads"], "test_topk_per_image", 100)
    structure, params, stats = split(model)
    scales = jnp.asarray([[new / old for new, old in zip(one["img"], one["ori"], strict=True)] for one in images])

    @jax.jit
    def find(params, features, tested):
        model = merge(structure, params, stats)
        found = model.detections(features, tested, sizes, limit=limit)
        return found, model.rounds_of(features, tested, sizes)

    found, rounds = find(params, features, tested)
    valid = np.asarray(tested.valid)
    for i, arrays in enumerate(rounds):
        for name, array in zip(("boxes", "cls_score", "bbox_pred"), arrays, strict=True):
            own = np.asarray(array)[valid].reshape(valid.sum(), -1)
            yield from recorded.near(f"{CASE} rounds", f"test/stage{i}/{name}", own, 1e-8)
    for i, count in enumerate(np.asarray(found.count)):
        case, boxes = f"{CASE} test", np.asarray(found.boxes[i, :count])
        masks = np.asarray(found.masks[i, :count])
        rescaled = boxes / np.tile(np.flip(np.asarray(scales[i], boxes.dtype)), 2)
        for name, array in {
            "final/boxes": boxes,
            "final/scores": found.scores[i, :count],
            "final/mask_probability": masks,
            "rescaled/boxes": rescaled,
        }.items():
            yield from recorded.near(case, f"test/{name}_{i}", array, 1e-8)
        if recorded.x64:
            yield discrete(case, f"labels of image {i}", found.labels[i, :count], recorded[f"test/final/labels_{i}"])
            above = paste(masks, rescaled, *images[i]["ori"]) - 0.5
            yield Mask(above >= 0, above).compared(case, f"masks of image {i}", recorded[f"test/rescaled/masks_{i}"])
