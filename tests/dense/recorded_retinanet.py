"""RetinaNet on given maps, as recorded in ``retinanet``: pyramid, head, targets, losses, gradients, detections."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from official_weights import digest, image, tensor
from recorded_cases import Compared, difference, discrete

from evmamba_jax.arrays import merge, split
from evmamba_jax.detection import retinanet
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.matching import Objects
from evmamba_jax.detection.per_anchor import Raw, Targets, targets
from evmamba_jax.detection.retinanet import ANCHORS, MATCHER, RetinaNet
from evmamba_jax.heads.retinanet import RetinaNetHead
from evmamba_jax.weights.convert import fill_rows
from evmamba_jax.weights.layers import Row


class GivenMaps(nnx.Module):
    """A backbone whose images are its maps."""


class Recorded:
    """What a file holds, and how far from it one may be."""

    def __init__(self, folder: Path, kind: str, x64: bool):
        self.doc: dict[str, Any] = json.loads((folder / f"{kind}.json").read_text())
        self.arrays: Mapping[str, np.ndarray] = np.load(folder / f"{kind}.npz")
        self.x64 = x64

    def __getitem__(self, name: str) -> np.ndarray:
        about, array = self.doc["arrays"][name], self.arrays[name]
        count = int(np.prod(about["shape"]))
        if about.get("packed_bits"):
            array = np.unpackbits(array)[:count].astype(bool)
        return array.reshape(about["shape"]) if array.size == count else array  # a part where there are "steps"

    def limit(self, name: str, wide: float = 1e-9) -> float | None:
        """Return what is allowed; None where float32 says nothing."""
        if self.x64:
            return wide
        noise = self.doc["float32_noise"].get(name, 0)
        return None if noise is None else max(10 * noise, 2e-5)

    def near(self, case: str, name: str, ours: Any, wide: float = 1e-9) -> Iterator[Compared]:
        """Yield the differences from one array of floats, and from its means where only a part is stored."""
        limit, about = self.limit(name, wide), self.doc["arrays"][name]
        if limit is None:
            return
        ours = np.asarray(ours, np.float64)
        if list(ours.shape) != about["shape"]:
            yield Compared(case, f"shape of {name}", np.inf, limit)
            return
        part = ours[tuple(slice(None, None, step) for step in about.get("steps", ()))]
        yield Compared(case, name, difference(part, self[name], rms=about.get("rms")), limit)
        if f"{name}/mean" in self.doc["arrays"]:
            mean = ours.mean(tuple(range(2, ours.ndim)) if ours.ndim > 2 else 0)
            yield Compared(case, f"{name}/mean", difference(mean, self[f"{name}/mean"], rms=about.get("rms")), limit)


def channels_first(array: Any) -> np.ndarray:
    """Return (B, H, W, C) as (B, C, H, W)."""
    return np.moveaxis(np.asarray(array), -1, 1)


def recorded_weights(doc: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights by official names."""
    found = {}
    for name, (shape, _, factor) in doc["state_dict"].items():
        array = tensor(name, tuple(shape))
        found[name] = array * np.float32(factor) if factor != 1 else array
    return found


def fill_recorded(case: str, doc: Mapping[str, Any], model: nnx.Module, rows: list[Row], dtype: Any) -> Compared:
    """Fill a model with the recorded weights, and return whether they come back the same by the official names."""
    weights = recorded_weights(doc)
    if digest(weights) != doc["weights_sha256"]:
        raise ValueError("the rule for weights gives others than were recorded")
    fill_rows(model, rows, {name: array.astype(dtype) for name, array in weights.items()})
    _, params, stats = split(model)
    ours = {**params, **stats}
    back = {row.official: row.layout.to_official(np.asarray(ours[row.ours])) for row in rows if row.ours in ours}
    weights = {name: array for name, array in weights.items() if "num_batches" not in name}
    same = [back.keys() == weights.keys(), all(np.array_equal(back[name], weights[name]) for name in weights)]
    return discrete(case, "round trip", same, np.ones(2, bool))


def detector(doc: Mapping[str, Any]) -> RetinaNet:
    """Return the recorded detector, without weights."""
    neck, head = doc["config_used"]["neck"], doc["config_used"]["bbox_head"]

    def build() -> RetinaNet:
        rngs = nnx.Rngs(0)
        widths = [one["shape"][1] for one in doc["input_maps"]]
        model = RetinaNet(GivenMaps(), widths, None, head["num_classes"], width=neck["out_channels"], rngs=rngs)
        depth, width = head["stacked_convs"], head["feat_channels"]
        model.head = RetinaNetHead(
            head["num_classes"], ANCHORS.per_cell, head["in_channels"], width, depth=depth, rngs=rngs
        )
        return model

    return nnx.eval_shape(build)


def padded_objects(recorded: Recorded, images: int, dtype: Any) -> Objects:
    """Return the objects of a batch, one row of padding more than any image needs."""
    boxes = [recorded[f"in/boxes_{i}"] for i in range(images)]
    most = 1 + max(len(own) for own in boxes)
    pad = lambda array: np.pad(array, [(0, most - len(array))] + [(0, 0)] * (array.ndim - 1))  # noqa: E731
    return Objects(
        jnp.asarray(np.stack([pad(own) for own in boxes]), dtype),
        jnp.asarray(np.stack([pad(recorded[f"in/labels_{i}"]) for i in range(images)])),
        jnp.asarray(np.stack([np.arange(most) < len(own) for own in boxes])),
    )


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    recorded = Recorded(folder, "retinanet", x64)
    doc, dtype = recorded.doc, np.float64 if x64 else np.float32
    model = detector(doc)
    rows = retinanet.head_rows(model)
    yield fill_recorded("retinanet names", doc, model, rows, dtype)
    maps = [jnp.asarray(image(one["shape"], one["seed"]), dtype) for one in doc["input_maps"]]
    objects = padded_objects(recorded, len(doc["images"]), dtype)
    padded, sizes = (jnp.asarray([one[name] for one in doc["images"]]) for name in ("pad_shape", "img_shape"))
    structure, params, _ = split(model)

    @jax.jit
    def run(params, maps):
        def total(params, maps):
            model = merge(structure, params, {})
            levels = model.neck(maps)
            raw = model.outputs(maps)
            wanted = targets(raw, objects, padded, ANCHORS, MATCHER)
            losses = retinanet.losses(raw, wanted)
            return losses.total, (levels, raw, wanted, losses)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, maps)

    (total, (levels, raw, wanted, losses)), (of_params, of_maps) = run(params, maps)
    for number, level in enumerate(levels, 3):
        yield from recorded.near("retinanet pyramid", f"fpn/p{number}", channels_first(level))
    for kind, outputs in (("cls", raw.logits), ("reg", raw.deltas)):
        for number, level in enumerate(outputs):
            yield from recorded.near("retinanet head", f"head/{kind}_{number}", channels_first(level))
    yield from compare_targets(recorded, "retinanet targets", "targets", ANCHORS, raw, wanted, padded)
    for name, ours in (("loss_cls", losses.classes), ("loss_bbox", losses.boxes), ("total", total)):
        yield from recorded.near("retinanet losses", f"loss/{name}", ours)
    yield from compare_gradients(recorded, "retinanet gradients", "", rows, of_params, of_maps)

    test = doc["config_used"]["test_cfg"]

    @jax.jit
    def find(raw, scales):
        thresholds = {"score_threshold": test["score_thr"], "iou_threshold": test["nms"]["iou_threshold"]}
        limits = {"candidates": test["nms_pre"], "limit": test["max_per_img"]}
        return retinanet.detections(raw, sizes, scales, **limits, **thresholds)

    scales = jnp.asarray([one["scale_factor"] for one in doc["images"]], dtype)
    for place, factors in (("test", jnp.ones_like(scales)), ("test/rescaled", scales)):
        found = jax.tree.map(np.asarray, find(raw, factors))
        for i, count in enumerate(found.count):
            case = f"retinanet {place}"
            yield from recorded.near(case, f"{place}/boxes_{i}", found.boxes[i, :count])
            yield from recorded.near(case, f"{place}/scores_{i}", found.scores[i, :count])
            if x64:
                yield discrete(case, f"labels of image {i}", found.labels[i, :count], recorded[f"{place}/labels_{i}"])


def compare_targets(
    recorded: Recorded, case: str, place: str, anchors: Anchors, raw: Raw, wanted: Targets, padded: jax.Array
) -> Iterator[Compared]:
    """Yield the differences of anchors, matches and deltas; which anchors are matched counts in float64 alone."""
    wide = raw.deltas[0].dtype
    yield from recorded.near(case, f"{place}/anchors", np.concatenate(anchors.boxes(raw.sizes, wide)))
    for i, image_size in enumerate(padded):
        positive = np.asarray(wanted.positive[i])
        deltas = np.asarray(wanted.deltas[i])[positive]
        yield from recorded.near(case, f"{place}/positive_deltas_{i}", deltas)
        if not recorded.x64:
            continue
        inside = np.concatenate(anchors.inside(raw.sizes, image_size))
        for name, ours in {
            "valid": inside,
            "labels": wanted.labels[i],
            "counted": wanted.counted[i],
            "positive_index": np.flatnonzero(positive),
        }.items():
            yield discrete(case, f"{name} of image {i}", ours, recorded[f"{place}/{name}_{i}"])
    if recorded.x64:
        yield discrete(case, "count", wanted.count, recorded[f"{place}/avg_factor"])


def compare_gradients(
    recorded: Recorded,
    case: str,
    place: str,
    rows: list[Row],
    of_params: Mapping[str, Any],
    of_maps: list[jax.Array],
) -> Iterator[Compared]:
    """Yield the differences of the gradients' norms and first entries, recorded at ``place`` with its slash."""
    by_name = {row.official: row for row in rows}
    norms, firsts = [], []
    for name in recorded.doc[f"{place}grad_names"]:
        if name.startswith("input map"):  # with a number where there are several
            gradient = channels_first(of_maps[int(name.removeprefix("input map") or 0)])
        else:
            row = by_name[name]
            gradient = row.layout.to_official(np.asarray(of_params[row.ours]))
        norms.append(np.linalg.norm(gradient))
        firsts.append(np.resize(np.pad(gradient.ravel()[:8], (0, 8)), 8))
    yield from recorded.near(case, f"{place}grad/l2", norms, 1e-6)
    yield from recorded.near(case, f"{place}grad/first8", firsts, 1e-6)
