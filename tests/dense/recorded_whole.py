"""Whole detectors on an image, as recorded in ``whole_*``: maps, pyramid, proposals, detections and masks.

Which detector and backbone a file is of follows from its names and shapes, and its configuration where there is one.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from official_weights import image, manifest
from recorded_cases import Compared, discrete
from recorded_detection_ops import Mask
from recorded_retinanet import Recorded, channels_first, fill_recorded

from evmamba_jax.arrays import merge, split
from evmamba_jax.detection import create_detector, retinanet
from evmamba_jax.detection.masks import paste
from evmamba_jax.detection.proposals import Limits
from evmamba_jax.detection.rcnn import RCNN
from evmamba_jax.models.registry import configuration, list_models
from evmamba_jax.weights.convert import table

KINDS = {"RetinaNet": "retinanet", "MaskRCNN": "mask_rcnn", "CascadeRCNN": "cascade_mask_rcnn"}
# Arrays by whose lengths kinds tell the channels of a pyramid, and classes (with what a class has of them).
SIZES = {
    "retinanet": ("neck.lateral_convs.0.conv.bias", "bbox_head.retina_cls.bias", 9, 0),
    "mask_rcnn": ("neck.lateral_convs.0.conv.bias", "roi_head.bbox_head.fc_cls.bias", 1, 1),
    "cascade_mask_rcnn": ("neck.lateral_convs.0.conv.bias", "roi_head.bbox_head.0.fc_cls.bias", 1, 1),
    "vim_cascade": ("backbone.simfp_2.5.norm.bias", "roi_heads.box_predictor.0.cls_score.bias", 1, 1),
}
# Names that families give to what we call width, depths and window_size.
OPTIONS = {"dims": "width", "embed_dim": "width", "dim": "width", "depths": "depths", "depth": "depth"}


def shapes_of(doc: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that is learned or counted, by official names."""
    return {name: tuple(shape) for name, (shape, *_) in doc["state_dict"].items() if "num_batches" not in name}


def kind_of(doc: Mapping[str, Any]) -> str:
    """Return our name of the recorded detector."""
    if "proposal_generator.rpn_head.conv.conv0.weight" in doc["state_dict"]:
        return "vim_cascade"
    return KINDS[doc["config_used"]["type"]]


def candidates(doc: Mapping[str, Any], family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield backbones by name, with options, of which one has the recorded names and shapes."""
    config = doc.get("config_used", {}).get("backbone", {})
    shapes = shapes_of(doc)
    patches, width = next((shape[1:] for name, shape in shapes.items() if name.endswith("pos_embed")), (None, None))
    # Those of the family that the file is named after come first.
    for name in sorted(list_models(), key=lambda name: type(configuration(name)).__name__.lower() != f"{family}config"):
        fields = dataclasses.asdict(configuration(name))
        given = {ours: config[theirs] for theirs, ours in OPTIONS.items() if theirs in config and ours in fields}
        if name.startswith("mambavision") and "window_size" in config:
            given["window_size"] = tuple(config["window_size"])
        if patches is not None and "image_size" in fields:
            layers = {part.split(".layers.")[1].split(".")[0] for part in shapes if ".layers." in part}
            given |= {"depth": len(layers), "image_size": math.isqrt(patches) * fields["patch_size"], "width": width}
            given["d_state"] = next(shape[1] for part, shape in shapes.items() if part.endswith("A_log"))
            if "rope" in fields:
                given |= {"rope": config.get("if_rope", True), "divide_out": config.get("if_divide_out", True)}
        yield name, {option: tuple(value) if isinstance(value, list) else value for option, value in given.items()}


def detector(doc: Mapping[str, Any], family: str) -> Any:
    """Return the recorded detector, without weights.

    Args:
        doc: what is recorded.
        family: of the backbone, where it is searched first.

    Raises:
        ValueError: no registered backbone has these names and shapes.
    """
    kind, shapes = kind_of(doc), shapes_of(doc)
    width, classes, each, background = SIZES[kind]
    options = {"width": shapes[width][0], "num_classes": shapes[classes][0] // each - background}
    for name, given in candidates(doc, family):
        if kind == "vim_cascade" and not name.startswith("vim"):
            continue
        model = nnx.eval_shape(
            lambda: create_detector(kind, backbone=name, backbone_options=given, **options)  # noqa: B023
        )
        if manifest(model) == shapes:
            return model
    raise ValueError(f"no backbone under {kind} has the recorded names and shapes")


class Whole(Recorded):
    """What a file holds, and which of its arrays were asked for."""

    def __init__(self, folder: Path, kind: str, x64: bool):
        super().__init__(folder, kind, x64)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.asked.add(name)
        return super().__getitem__(name)

    def near(self, case: str, name: str, ours: Any, wide: float = 1e-9) -> Iterator[Compared]:
        """Yield the differences from an array, if there is one."""
        if name in self.doc["arrays"]:
            yield from super().near(case, name, ours, wide)


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    for path in sorted(folder.glob("whole_*.npz")):
        yield from compare_file(Whole(folder, path.stem, x64), path.stem)


def compare_file(recorded: Whole, name: str) -> Iterator[Compared]:
    """Yield every difference from one file; in float64 an array that nothing is compared with is one."""
    doc, dtype = recorded.doc, np.float64 if recorded.x64 else np.float32
    model = detector(doc, name.split("_")[1])
    yield fill_recorded(f"{name} names", doc, model, table(model), dtype)
    model.eval()
    about, given, test = doc["image"], doc["input"], doc.get("config_used", {}).get("test_cfg", {})
    height, width = about["img_shape"]
    pixels = image(given["shape"], given["seed"]).astype(dtype)
    pixels[:, height:] = pixels[:, :, width:] = 0
    sizes, scales = jnp.asarray([[height, width]]), jnp.asarray([about["scale_factor"]], dtype)
    structure, params, stats = split(model)

    @jax.jit
    def run(params, pixels):
        model = merge(structure, params, stats)
        maps = model.backbone.features(pixels)
        features = model.outputs(maps if model.pyramid is None else model.pyramid(maps))
        return maps, features, found_in(model, features, sizes, test)

    maps, features, (proposed, found) = run(params, pixels)
    for i, array in enumerate(maps):
        yield from recorded.near(f"{name} maps", f"backbone/out{i}", channels_first(array))
    raw = features
    if isinstance(model, RCNN):
        raw = features.raw
        for i, array in enumerate(features.levels, 2):
            for place in ("fpn", "pyramid"):
                yield from recorded.near(f"{name} pyramid", f"{place}/p{i}", channels_first(array))
    for names, arrays in ((("cls", "logits"), raw.logits), (("reg", "deltas"), raw.deltas)):
        for i, array in enumerate(arrays):
            for place in (f"{head}/{kind}_{i}" for head in ("rpn", "head") for kind in names):
                yield from recorded.near(f"{name} anchors", place, channels_first(array))
    if proposed is not None:
        count = int(proposed.valid.sum())
        for kind, array in (("boxes", proposed.boxes), ("scores", proposed.scores)):
            yield from recorded.near(f"{name} proposals", f"proposals/{kind}", array[0, :count])
    own = int(found.count[0])
    for place, canvas, factors in (("final", "img_shape", 1), ("rescaled", "ori_shape", np.tile(scales[0], 2))):
        case, boxes = f"{name} {place}", np.asarray(found.boxes[0, :own]) / factors
        yield from recorded.near(case, f"{place}/boxes", boxes, 1e-8)
        yield from recorded.near(case, f"{place}/scores", found.scores[0, :own], 1e-8)
        if not recorded.x64:
            continue
        if f"{place}/labels" in doc["arrays"]:
            yield discrete(case, "labels", found.labels[0, :own], recorded[f"{place}/labels"])
        if f"{place}/masks" in doc["arrays"]:
            above = paste(np.asarray(found.masks[0, :own]), boxes, *about[canvas])
            above -= test.get("rcnn", {}).get("mask_thr_binary", 0.5)
            yield Mask(above >= 0, above).compared(case, "masks", recorded[f"{place}/masks"])
    if recorded.x64:
        for place in sorted(doc["arrays"].keys() - recorded.asked):
            yield Compared(name, f"nothing is compared with {place}", np.inf, 0.5)


def found_in(model: Any, features: Any, sizes: jax.Array, test: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return proposals, None of a detector without, and detections, by the settings of a recorded ``test_cfg``."""
    last = test.get("rcnn", test)
    options = {"limit": last.get("max_per_img", 100), "score_threshold": last.get("score_thr", 0.05)}
    options["iou_threshold"] = last.get("nms", {}).get("iou_threshold", 0.5)
    if not isinstance(model, RCNN):
        return None, retinanet.detections(features, sizes, candidates=test.get("nms_pre", 1000), **options)
    limits = model.settings.tested
    if "rpn" in test:
        limits = Limits(test["rpn"]["nms_pre"], test["rpn"]["max_per_img"])
    proposed = model.proposals(features, sizes, limits)
    return proposed, model.detections(features, proposed, sizes, **options)
