"""Anchors, coding, matching, suppression and losses of detectors, as recorded in ``ops``."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from official_weights import image
from recorded_cases import Compared, difference, discrete
from recorded_retinanet import Recorded

from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import DeltaCoder, clip, overlaps
from evmamba_jax.detection.losses import l1, mean_over, sigmoid_focal
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.nms import batched_nms, multiclass_nms, nms
from evmamba_jax.heads.fpn import every_second

Arrays = Mapping[str, Any]
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
    x = jnp.asarray(image(facts["input"]["shape"], facts["input"]["seed"]), float)
    return {"p6": jnp.moveaxis(every_second(x), -1, 1)}


# The longest beginning of a case's name that is among these decides; None: there is nothing of ours to compare.
RUNS: Mapping[str, Callable[[Arrays, Arrays], Outputs] | None] = {
    "nms_": suppression,
    "batched_nms_": suppression,
    "multiclass_nms": of_classes,
    "overlaps_": overlap,
    "overlaps_giou": None,
    "coder_": coder,
    "anchors_": anchors,
    "assigner_": assigner,
    "focal": focal,
    "l1": absolute,
    "fpn_extra_level": extra_level,
}


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
        outputs = jax.jit(partial(run, facts))(given)
        if "count" in outputs:
            found = int(outputs.pop("count"))
            outputs = {name: array[:found] for name, array in outputs.items()}
        wanted = {name.split("/")[-1]: recorded[name] for name in of_case if name.startswith(f"{case}/out/")}
        if wanted.keys() - outputs.keys():
            raise ValueError(f"{case} has {sorted(wanted)}, ours {sorted(outputs)}")
        for name, array in wanted.items():
            if np.issubdtype(array.dtype, np.floating):
                limit = (1e-6 if name == "grad" else 1e-9) if x64 else 2e-5
                yield Compared(case, name, difference(outputs[name], array), limit)
            else:
                yield discrete(case, name, outputs[name], array)
