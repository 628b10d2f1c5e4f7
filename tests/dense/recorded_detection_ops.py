"""Anchors, coding, matching, suppression and losses of detectors, as recorded in ``ops``."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from official_weights import image
from recorded_cases import Compared, difference, discrete
from recorded_retinanet import Recorded

from evmamba_jax.detection import masks, regions
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import DeltaCoder, clip, overlaps
from evmamba_jax.detection.losses import (
    binary_cross_entropy,
    cross_entropy,
    giou,
    l1,
    mean_over,
    of_class,
    sigmoid_focal,
    smooth_l1,
)
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.nms import batched_nms, multiclass_nms, nms
from evmamba_jax.heads.fpn import every_second

Arrays = Mapping[str, Any]


class Mask(NamedTuple):
    """Booleans, and how far the values that they come from are above the threshold."""

    ours: Any
    above: Any

    def compared(self, case: str, what: str, wanted: np.ndarray) -> Compared:
        """Return the comparison with recorded booleans, except for values at the threshold."""
        at_threshold = np.abs(np.asarray(self.above)) < 1e-6
        return discrete(case, what, np.where(at_threshold, wanted, self.ours), wanted)


Outputs = dict[str, Any]  # by the recorded names; of those with a "count", so many rows are meant


def suppression(facts: Arrays, given: Arrays) -> Outputs:
    """NMS of all boxes, or within groups."""
    boxes, scores, count = given["boxes"], given["scores"], len(given["boxes"])
    threshold = facts["iou_threshold"]
    if "groups" not in given:
        return nms(boxes, scores, threshold, limit=count)._asdict()
    index, found = batched_nms(boxes, scores, given["groups"], threshold, limit=count)
    return {"index": index, "boxes_and_scores": jnp.c_[boxes[index], scores[index]], "count": found}


def of_classes(facts: Arrays, given: Arrays) -> Outputs:
    """NMS within classes; the last column of scores is the background."""
    scores = given["scores"][:, :-1]
    boxes = given["boxes"].reshape(*scores.shape, 4)
    found = multiclass_nms(boxes, scores, facts["score_thr"], facts["iou_threshold"], limit=facts["max_num"])
    both = {"boxes_and_scores": jnp.c_[found.boxes, found.scores], "count": found.count}
    return both | {"labels": found.labels, "index_into_flat": found.index}


def overlap(facts: Arrays, given: Arrays) -> Outputs:
    """Overlaps of every pair."""
    return {"overlaps": overlaps(given["a"], given["b"], facts["mode"])}


def coder(facts: Arrays, given: Arrays) -> Outputs:
    """Encode and decode; two classes of deltas for each box."""
    assert not any(facts["means"])
    code = DeltaCoder(tuple(facts["stds"]))
    boxes, deltas = given["boxes"], given["deltas_two_classes"]
    decoded = code.decode(boxes[:, None], deltas.reshape(len(boxes), -1, 4))
    inside = clip(decoded, jnp.asarray(facts["max_shape"]))
    return {
        "deltas": code.encode(boxes, given["targets"]),
        "decoded": inside.reshape(deltas.shape),
        "decoded_no_border": decoded.reshape(deltas.shape),
    }


def anchors(facts: Arrays, given: Arrays) -> Outputs:
    """Anchors of some levels, and which belong to the image."""
    config, outputs = facts["config"], {}
    octaves = config.get("scales_per_octave", 0)
    scales = config.get("scales") or [config["octave_base_scale"] * 2 ** (i / octaves) for i in range(octaves)]
    grid = Anchors(tuple(config["strides"]), tuple(config["ratios"]), tuple(scales))
    dtype = jnp.zeros((), float).dtype
    boxes, inside = (
        grid.boxes(facts["map_sizes"], dtype),
        grid.inside(facts["map_sizes"], jnp.asarray(facts["pad_shape"])),
    )
    for level in range(len(boxes)):
        outputs |= {f"base_{level}": grid.base(level, dtype), f"anchors_{level}": boxes[level]}
        outputs[f"valid_{level}"] = inside[level]
    return outputs


def assigner(facts: Arrays, given: Arrays) -> Outputs:
    """Match, with a row of padding behind the objects."""
    config, boxes = facts["config"], given["boxes"]
    objects = given.get("objects", jnp.zeros((0, 4), boxes.dtype))
    count = len(objects)
    matcher = Matcher(
        positive=config["pos_iou_thr"],
        negative=config["neg_iou_thr"],
        minimum=config["min_pos_iou"] if config.get("match_low_quality", True) else None,
        ignored=config["ignore_iof_thr"] if config["ignore_iof_thr"] > 0 else None,
    )
    padded = jnp.pad(objects, ((0, 1), (0, 0)))
    found = matcher(boxes, padded, jnp.arange(count + 1) < count, regions=given.get("ignored"))
    outputs = {"gt_index": found.index, "max_overlap": found.overlap}
    if count:
        outputs["labels"] = jnp.where(found.index > 0, given["labels"][jnp.maximum(found.index - 1, 0)], -1)
    return outputs


def focal(facts: Arrays, given: Arrays) -> Outputs:
    """Focal loss with a weight for each row."""

    def loss(logits):
        each = sigmoid_focal(logits, given["target"], alpha=facts["alpha"], gamma=facts["gamma"])
        return mean_over(each, given["weight"][:, None], jnp.asarray(facts["avg_factor"])) * facts["loss_weight"]

    return dict(zip(("loss", "grad"), jax.value_and_grad(loss)(given["logits"]), strict=True))


def absolute(facts: Arrays, given: Arrays) -> Outputs:
    """L1 with a weight for each entry."""

    def loss(predicted):
        return mean_over(l1(predicted, given["target"]), given["weight"], jnp.asarray(facts["avg_factor"]))

    return dict(zip(("loss", "grad"), jax.value_and_grad(loss)(given["pred"]), strict=True))


def extra_level(facts: Arrays, given: Arrays) -> Outputs:
    """The level that the pyramid makes of the one before."""
    return {"p6": jnp.moveaxis(every_second(drawn(facts["input"])), -1, 1)}


def region_features(facts: Arrays, given: Arrays) -> Outputs:
    """RoIAlign on both images, of which each region takes its own, and the gradient by the map."""
    features = drawn(facts["feature"])
    image, boxes = given["rois"][:, 0].astype(int), given["rois"][:, 1:]

    def held(features):
        align = partial(regions.roi_align, samples=facts["sampling_ratio"], aligned=facts["aligned"])
        of_images = [align(x, boxes, 1 / facts["spatial_scale"], facts["output_size"]) for x in features]
        return jnp.stack(of_images)[image, jnp.arange(len(boxes))]

    outputs, back = jax.vjp(held, features)
    (gradient,) = back(drawn(facts["cotangent"]))
    return {"features": jnp.moveaxis(outputs, -1, 1), "grad_feature": jnp.moveaxis(gradient, -1, 1)}


def extractor(facts: Arrays, given: Arrays) -> Outputs:
    """The level of each region, and what it holds there."""
    strides, size = facts["config"]["featmap_strides"], facts["config"]["roi_layer"]["output_size"]
    assert facts["finest_scale"] == regions.FINEST
    maps = [drawn(one) for one in facts["features"]]
    image, boxes = given["rois"][:, 0].astype(int), given["rois"][:, 1:]
    of_images = regions.extract(maps, jnp.broadcast_to(boxes, (len(maps[0]), *boxes.shape)), strides, size)
    held = of_images[image, jnp.arange(len(boxes))]
    return {"levels": regions.levels_of(boxes, len(maps)), "features": jnp.moveaxis(held, -1, 1)}


def mask_target(facts: Arrays, given: Arrays) -> Outputs:
    """Masks of objects in boxes."""
    arguments = given["masks"], given["which"], given["boxes"], facts["size"]
    soft = masks.shares(*arguments)
    return {"soft": soft, "target": Mask(masks.mask_targets(*arguments), soft - 0.5)}


def pasted(facts: Arrays, given: Arrays) -> Outputs:
    """Masks in a picture."""
    values = masks.paste(np.asarray(given["masks"])[:, 0], np.asarray(given["boxes"]), *facts["image"])
    threshold = facts["threshold"]
    return {"pasted": values, "pasted_binary": Mask(values >= threshold, values - threshold)}


def smooth(facts: Arrays, given: Arrays) -> Outputs:
    """Smooth L1 with a weight for each entry."""

    def loss(predicted):
        each = smooth_l1(predicted, given["target"], facts["beta"])
        return mean_over(each, given["weight"], jnp.asarray(facts["avg_factor"]))

    return dict(zip(("loss", "grad"), jax.value_and_grad(loss)(given["pred"]), strict=True))


def generalized_overlap(facts: Arrays, given: Arrays) -> Outputs:
    """GIoU's loss with a weight for each box."""

    def loss(predicted):
        each = giou(predicted, given["target"])
        mean = mean_over(each, given["weight"].mean(-1), jnp.asarray(facts["avg_factor"]))
        return mean * facts["loss_weight"]

    return dict(zip(("loss", "grad"), jax.value_and_grad(loss)(given["pred"]), strict=True))


def softmax(facts: Arrays, given: Arrays) -> Outputs:
    """Cross entropy of classes with a weight for each row."""

    def loss(logits):
        each = cross_entropy(logits, given["target"])
        return mean_over(each, given["weight"], jnp.asarray(facts["avg_factor"]))

    return dict(zip(("loss", "grad"), jax.value_and_grad(loss)(given["logits"]), strict=True))


def objectness(facts: Arrays, given: Arrays) -> Outputs:
    """Cross entropy of objects, label 0, against background."""

    def loss(logits):
        each = binary_cross_entropy(logits[:, 0], given["target"] == 0)
        return mean_over(each, given["weight"], jnp.asarray(facts["avg_factor"]))

    return dict(zip(("loss", "grad"), jax.value_and_grad(loss)(given["logits"]), strict=True))


def mask_cross_entropy(facts: Arrays, given: Arrays) -> Outputs:
    """Cross entropy of the mask of each region's class."""

    def loss(logits):
        chosen = of_class(jnp.moveaxis(logits, 1, -1), given["labels"])
        each = binary_cross_entropy(chosen, given["target"])
        return mean_over(each, jnp.ones(()), jnp.asarray(each.size))

    loss, gradient = jax.value_and_grad(loss)(given["logits"])
    return {"loss": loss[None], "grad": gradient}


def drawn(about: Arrays) -> jax.Array:
    """Return an array (B, H, W, C) that the rule for images makes."""
    return jnp.asarray(image(about["shape"], about["seed"]), float)


# The longest beginning of a case's name that is among these decides.
RUNS: Mapping[str, Callable[[Arrays, Arrays], Outputs]] = {
    "nms_": suppression,
    "batched_nms_": suppression,
    "multiclass_nms": of_classes,
    "overlaps_": overlap,
    "coder_": coder,
    "anchors_": anchors,
    "assigner_": assigner,
    "focal": focal,
    "l1": absolute,
    "smooth_l1": smooth,
    "giou": generalized_overlap,
    "cross_entropy_softmax": softmax,
    "cross_entropy_sigmoid_rpn": objectness,
    "cross_entropy_mask": mask_cross_entropy,
    "fpn_extra_level": extra_level,
    "roi_align_": region_features,
    "roi_extractor": extractor,
    "mask_target": mask_target,
    "paste": pasted,
}

ON_HOST = (pasted,)
# Where only a part of the rows is recorded: which.
PARTS = {"soft": slice(None, None, 2), "pasted": slice(2)}
# In float32 the places of the samples are rounded; official code in float32 is as far off (10 times the noise that
# ``maskrcnn`` has recorded for ``test/roi_feats``).
OF_REGIONS = 1e-4


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    recorded = Recorded(folder, "ops", x64)
    dtype = np.float64 if x64 else np.float32
    for case, facts in recorded.doc["cases"].items():
        begin = max((start for start in RUNS if case.startswith(start)), key=len, default=None)
        run = RUNS[begin] if begin else None
        if run is None:
            continue
        of_case = [name for name in recorded.doc["arrays"] if name.startswith(f"{case}/")]
        given = {}
        for name in of_case:
            if name.startswith(f"{case}/in/"):
                array = recorded[name]
                floating = np.issubdtype(array.dtype, np.floating)
                given[name.split("/")[-1]] = jnp.asarray(array, dtype if floating else None)
        one = partial(run, facts)
        outputs = (one if run in ON_HOST else jax.jit(one))(given)
        if "count" in outputs:
            found = int(outputs.pop("count"))
            outputs = {name: array[:found] for name, array in outputs.items()}
        wanted = {name.split("/")[-1]: recorded[name] for name in of_case if name.startswith(f"{case}/out/")}
        if wanted.keys() - outputs.keys():
            raise ValueError(f"{case} has {sorted(wanted)}, ours {sorted(outputs)}")
        for name, array in wanted.items():
            ours = outputs[name]
            if isinstance(ours, Mask):
                yield ours.compared(case, name, array)
            elif np.issubdtype(array.dtype, np.floating):
                ours = ours[PARTS[name]] if name in PARTS else ours
                limit = {"grad": 1e-6, "grad_feature": 1e-6, "features": 1e-8}.get(name, 1e-9)
                if not x64:
                    limit = OF_REGIONS if begin in ("roi_align_", "roi_extractor") else 2e-5
                yield Compared(case, name, difference(ours, array), limit)
            else:
                yield discrete(case, name, ours, array)
