"""What padding does to an evaluation: ``eval_padding`` exact and buckets, of a segmenter and a detector of digits.

    python train_tpu.py --config configs/digits_segmentation.py --workdir SEGMENTER
    python train_tpu.py --config configs/digits_detection.py --workdir DETECTOR
    python benchmarks/eval_padding.py SEGMENTER DETECTOR [--out FILE]

The scenes of digits are cut to many sizes, prepared with ``python -m evmamba_jax.data prepare``, and evaluated both
ways from the same weights. A cut goes through digits, so figures are lower than on whole scenes.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from evmamba_jax import cli, training
from evmamba_jax.data.__main__ import main as data_command
from evmamba_jax.data.dense_config import DenseData
from evmamba_jax.data.scenes import CLASSES, GROUND, LENGTHS, scene
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.tasks.opening import open_composed

SIDES, SIDE = (72, 88, 104, 128), 128  # of cuts, and of whole scenes, pixels
LEAST = 12  # pixels that a digit must have left to count as an object


def write_scenes(folder: Path) -> None:
    """Write the test scenes, cut, as images, label maps, and boxes in COCO's form."""
    rng, boxes = np.random.default_rng(0), []
    for name in ("images", "labels"):
        (folder / name).mkdir()
    (folder / "classes.txt").write_text("\n".join((GROUND, *CLASSES)))
    sizes = rng.choice(SIDES, (LENGTHS["test"], 2))
    for i, (height, width) in enumerate(sizes.tolist()):
        top, left = int(rng.integers(SIDE - height + 1)), int(rng.integers(SIDE - width + 1))
        window = slice(top, top + height), slice(left, left + width)
        found = scene("test", i)
        Image.fromarray(found.image[window]).save(folder / f"images/{i:03}.png")
        Image.fromarray(found.label_map[window]).save(folder / f"labels/{i:03}.png")
        for label, mask in zip(found.labels.tolist(), found.masks, strict=True):
            rows, columns = np.nonzero(mask[window])
            if len(rows) >= LEAST:
                corner = int(columns.min()), int(rows.min())
                sides = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
                about = {"category_id": label, "bbox": [*corner, *sides], "area": len(rows), "iscrowd": 0}
                boxes.append({"id": len(boxes) + 1, "image_id": i, **about})
    images = [{"id": i, "file_name": f"{i:03}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes.tolist())]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(document))


def prepare(folder: Path) -> None:
    """Prepare them, the same for training, which a data set must have, and for validation."""
    labels = [folder / "images", folder / "labels"]
    boxes = [folder / "images", folder / "boxes.json"]
    for what, places, more in (
        ("label_maps", labels, ["--classes", folder / "classes.txt"]),
        ("boxes", boxes, []),
    ):
        options = ["--train", *places, "--val", *places, "--name", f"cut_{what}", "--data-dir", folder / "sets", *more]
        if data_command(["prepare", what, *map(str, options)]):
            raise SystemExit(f"the {what} were not prepared")


def evaluate(run: Path, padding: str, name: str, folder: Path) -> tuple[dict[str, float], float]:
    """Return the figures of an evaluation, and its seconds."""
    begun = time.monotonic()
    config = open_composed(run).task.config
    config.init_from = str(run)
    data = cast(DenseData, config.data)
    data.name, data.data_dir, data.eval_split = name, str(folder / "sets"), "validation"
    data.eval_padding = padding
    return training.run(config, folder / f"{name}_{padding}"), time.monotonic() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("segmenter", type=Path, help="a run of configs/digits_segmentation.py")
    parser.add_argument("detector", type=Path, help="a run of configs/digits_detection.py")
    parser.add_argument("--out", type=Path, help="write JSON here, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "Padding of an evaluation: exact or in buckets",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax"),
        date=machine.today(),
    )
    report.text(
        f"{LENGTHS['test']} scenes of digits, height and width each cut to {', '.join(map(str, SIDES))} pixels, tested "
        "by the same weights with both values of `eval_padding`. Written by `benchmarks/eval_padding.py`."
    )
    report.table(
        "", "figure", ("exact", "{:.2f}"), ("buckets", "{:.2f}"), ("exact, s", "{:.0f}"), ("buckets, s", "{:.0f}")
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_scenes(folder)
        prepare(folder)
        for what, run, name, figures in (
            ("segmentation", options.segmenter, "cut_label_maps", ("mIoU", "aAcc")),
            ("detection", options.detector, "cut_boxes", ("AP", "AP50")),
        ):
            (exact, slow), (buckets, fast) = (evaluate(run, padding, name, folder) for padding in ("exact", "buckets"))
            for figure in figures:
                report.row(what, figure, exact[figure], buckets[figure], slow, fast)


if __name__ == "__main__":
    sys.exit(cli.main(main))
