"""Whole runs on label maps, boxes and masks: of scenes, and of images that a user has, of any size."""

import csv
import functools
import json

import jax
import numpy as np
import pytest
import scene_runs
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from configs import digits_detection, digits_segmentation
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.data import scenes
from evmamba_jax.data.__main__ import main
from evmamba_jax.data.dense import open_dense
from evmamba_jax.data.outlines import run_lengths, to_mask
from evmamba_jax.data.scenes import scene
from evmamba_jax.detection import rcnn, retinanet
from evmamba_jax.detection.evaluate import FIGURES, result_rows
from evmamba_jax.tasks.detection import Collected

SIZES = [(96, 128), (128, 96), (110, 120)]  # heights and widths that scenes are cut to


def cut(index):
    """Return image, label map, and boxes with labels and masks, of a scene cut to a size."""
    one, (height, width) = scene("train", index), SIZES[index % 3]
    shown = [(mask[:height, :width], label) for mask, label in zip(one.masks, one.labels, strict=True)]
    places = [(np.argwhere(mask), label) for mask, label in shown if mask.sum() > 20]
    boxes = [(*p.min(0)[::-1].tolist(), *(np.ptp(p, 0)[::-1] + 1).tolist(), int(label)) for p, label in places]
    masks = [mask for mask, _ in shown if mask.sum() > 20]
    return one.image[:height, :width], one.label_map[:height, :width], boxes, masks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of data sets, prepared from images with label PNGs and a COCO file by the command."""
    root = tmp_path_factory.mktemp("own")
    for split, numbers in (("train", range(6)), ("val", range(6, 10))):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        images, annotations = [], []
        for number in numbers:
            image, labels, boxes, masks = cut(number)
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{number}.png")
            size = {"height": image.shape[0], "width": image.shape[1]}
            images.append({"id": 100 + number, "file_name": f"{number}.png", **size})
            for (x, y, w, h, label), mask in zip(boxes, masks, strict=True):
                one = {"image_id": 100 + number, "category_id": 7 * label + 1, "bbox": [x, y, w, h], "area": w * h}
                # One in three as the polygon around its box.
                around = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                one["segmentation"] = around if len(annotations) % 3 == 0 else run_lengths(mask)
                annotations.append({**one, "iscrowd": 0, "id": len(annotations) + 1})
        categories = [{"id": 7 * k + 1, "name": f"digit {k}"} for k in range(10)]
        about = {"images": images, "annotations": annotations, "categories": categories}
        (root / split / "boxes.json").write_text(json.dumps(about))
    (root / "classes.txt").write_text("\n".join(["ground", *(f"digit {k}" for k in range(10))]))
    places = {split: [str(root / split / "images"), str(root / split / "labels")] for split in ("train", "val")}
    options = ["--train", *places["train"], "--val", *places["val"], "--classes", str(root / "classes.txt")]
    assert not main(["prepare", "label_maps", "--name", "maps", *options, "--data-dir", str(root / "sets")])
    places = {split: [str(root / split / "images"), str(root / split / "boxes.json")] for split in ("train", "val")}
    options = ["--train", *places["train"], "--val", *places["val"]]
    assert not main(["prepare", "boxes", "--name", "boxes", *options, "--data-dir", str(root / "sets")])
    return root


def own(config, root, name, **data):
    """Return the configuration with a set of ``root`` as its data."""
    own = {"name": name, "data_dir": str(root / "sets"), "eval_split": "validation", "eval_padding": "exact"}
    for field, value in (own | data).items():
        setattr(config.data, field, value)
    return config


def table(folder):
    with (folder / "per_class.csv").open() as file:
        return list(csv.DictReader(file))


def test_label_maps(prepared, tmp_path):
    """A run on scenes, with all that it leaves; then its model is evaluated on label maps of other sizes."""

    def make():
        config = scene_runs.small(digits_segmentation.get_config())
        config.segmenter.width = config.segmenter.aux_width = 8
        return config

    figures, evaluated, told = scene_runs.trained(make, tmp_path / "run")
    assert figures == evaluated
    assert figures["examples"] == 6
    assert f"mIoU {figures['mIoU']:.2f} %" in told
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "aux_loss", "accuracy"} <= rows[0].keys()
    assert (tmp_path / "run" / "label_maps.png").is_file()
    assert "mIoU" in (tmp_path / "run" / "report.html").read_text()
    classes = table(tmp_path / "evaluated")
    assert [row["name"] for row in classes] == ["ground", *"0123456789"]
    assert sum(int(row["pixels"]) for row in classes) == 6 * 128 * 128
    assert np.mean([float(row["IoU"]) for row in classes if row["IoU"]]) == pytest.approx(figures["mIoU"], abs=0.01)

    config = own(make(), prepared, "maps", scale=(128, 96))
    config.eval_only, config.init_from = True, str(tmp_path / "run")
    assert scene_runs.on_one_device(config, tmp_path / "own")["examples"] == 4
    classes = table(tmp_path / "own")
    wanted = np.bincount(np.concatenate([cut(number)[1].ravel() for number in range(6, 10)]), minlength=11)
    assert [int(row["pixels"]) for row in classes] == wanted.tolist()
    assert [row["name"] for row in classes][:2] == ["ground", "digit 0"]


def test_boxes(prepared, tmp_path, monkeypatch):
    """Images of two shapes train, by two programs; COCO's own tools read the results and agree with the figures."""
    unsure = functools.partial(retinanet.detections, score_threshold=0.0)
    monkeypatch.setattr(retinanet, "detections", unsure)  # a model of two steps is sure of nothing

    def make():
        config = own(scene_runs.small(digits_detection.get_config()), prepared, "boxes", scale=(144, 104))
        config.detector.width, config.detector.detections = 8, 5
        return config

    figures, evaluated, told = scene_runs.trained(make, tmp_path / "run")
    assert figures == evaluated
    assert figures["examples"] == 4
    assert f"AP {figures['AP']:.2f} %" in told
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(rows[0]["class_loss"] + rows[0]["box_loss"], rel=1e-5)
    assert (tmp_path / "run" / "detections.png").is_file()
    assert [row["name"] for row in table(tmp_path / "evaluated")] == [f"digit {k}" for k in range(10)]

    results = json.loads((tmp_path / "evaluated" / "detections.json").read_text())
    assert {row["image_id"] for row in results} == {106, 107, 108, 109}
    coco = COCO(str(prepared / "val" / "boxes.json"))
    again = COCOeval(coco, coco.loadRes(results), "bbox")
    again.evaluate()
    again.accumulate()
    again.summarize()
    assert figures["AP"] == pytest.approx(100 * again.stats[0], abs=0.05)
    assert figures["AR100"] == pytest.approx(100 * again.stats[8], abs=0.05)
    assert (tmp_path / "evaluated" / "precision_recall.png").is_file()


def test_masks(tmp_path, monkeypatch):
    """Mask R-CNN on scenes, with all that a run leaves; killed after a step and gone on with, it is the same."""
    unsure = functools.partialmethod(rcnn.RCNN.detections, score_threshold=0.0)
    monkeypatch.setattr(rcnn.RCNN, "detections", unsure)
    save = Checkpoints.save

    def make():
        config = scene_runs.small(digits_detection.get_config("mask_rcnn"))
        config.detector.width, config.detector.detections, config.detector.fc_width = 8, 5, 8
        config.detector.regions, config.detector.proposals, config.save_every.steps = 8, 12, 1
        return config

    def killed(self, at, *args, **options):
        save(self, at, *args, **options)
        if at == 1:
            raise KeyboardInterrupt

    figures, evaluated, told = scene_runs.trained(make, tmp_path / "run")
    assert figures == evaluated
    assert f"of masks AP {figures['mask_AP']:.2f} %" in told
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
    row = json.loads(lines[0])
    parts = ("rpn_class_loss", "rpn_box_loss", "class_loss", "box_loss", "mask_loss")
    assert row["loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-5)
    assert row["mask_loss"] > 0
    assert list(table(tmp_path / "evaluated")[0]) == ["class", "name", "AP", "mask_AP"]
    results = json.loads((tmp_path / "evaluated" / "detections.json").read_text())
    assert {(len(one["bbox"]), *one["segmentation"]["size"]) for one in results} == {(4, 128, 128)}
    assert (tmp_path / "run" / "detections.png").is_file()
    assert (tmp_path / "evaluated" / "mask_precision_recall.png").is_file()

    monkeypatch.setattr(scenes, "LENGTHS", {"train": 8, "test": 6})
    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        scene_runs.on_one_device(make(), tmp_path / "killed")
    monkeypatch.setattr(Checkpoints, "save", save)
    assert scene_runs.on_one_device(make(), tmp_path / "killed") == figures
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes().splitlines() == lines


def test_figures_of_masks_are_those_of_coco(prepared):
    """Detections near the objects of a user's images, polygons and run lengths: COCO's tools read the file alike."""
    source = open_dense("boxes", str(prepared / "sets"), "validation")
    collected, rng, counts = Collected(pictures=True, outlined=source), np.random.default_rng(0), []
    for index, record in enumerate(source[i] for i in range(len(source))):
        boxes, labels = record["boxes"].astype(np.float32), record["labels"]
        count = len(boxes)
        counts.append(count)
        near = boxes + rng.normal(0, 2.5, boxes.shape).astype(np.float32)
        masks = rng.uniform(0.1, 1, (count, 28, 28)).astype(np.float32) ** rng.uniform(0.1, 1, (count, 1, 1))
        for mask, outline, (x0, y0, x1, y1) in zip(masks, record["segmentations"], near, strict=True):
            if not isinstance(outline, dict):
                continue
            whole = to_mask(outline, *source.sizes[index])
            at = [np.linspace(*ends, 57)[1::2].astype(int) for ends in ((y0, y1), (x0, x1))]
            mask[:] = whole[np.clip(at[0], 0, len(whole) - 1)[:, None], np.clip(at[1], 0, whole.shape[1] - 1)]
        found = {"boxes": near, "scores": rng.uniform(size=count), "labels": labels, "count": count, "masks": masks}
        truth = {"boxes": boxes, "labels": labels, "valid": np.ones(count, bool), "area": record["area"]}
        about = {"crowd": record["crowd"], "index": index, "weight": 1, "scale": np.ones(2), "found": found}
        rows = {"image": np.zeros((1, *source.sizes[index], 3), np.uint8), "size": source.sizes[index][None]}
        collected.add(rows, jax.tree.map(lambda array: np.asarray(array)[None], truth | about), slice(0, 1))
    assert [len(found.outlines) for found in collected.found] == counts

    results = result_rows(collected.images, collected.found, source)
    coco = COCO(str(prepared / "val" / "boxes.json"))
    for of, kind in (("boxes", "bbox"), ("outlines", "segm")):
        figures = collected.precision(10, of).figures
        # As mmdet does, masks count by their own area: with a box COCO's tools would take the box's.
        rows = [{name: value for name, value in row.items() if kind == "bbox" or name != "bbox"} for row in results]
        again = COCOeval(coco, coco.loadRes(rows), kind)
        again.evaluate()
        again.accumulate()
        again.summarize()
        for name, value in zip(FIGURES, again.stats, strict=True):
            assert figures.get(name, -100) == pytest.approx(100 * value, abs=0.05), name
        assert 20 < figures["AP"] < 80
