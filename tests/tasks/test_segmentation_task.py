"""A class for every pixel: figures against scikit-learn, and a run of two steps with all that it leaves."""

import csv
import json

import numpy as np
import pytest
import scene_runs
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from configs import digits_segmentation
from evmamba_jax.errors import UserError
from evmamba_jax.tasks import segmentation, task_of


def small():
    config = scene_runs.small(digits_segmentation.get_config())
    config.segmenter.width = config.segmenter.aux_width = 8
    return config


def test_figures_are_sklearns():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (2, 300))
    truth[truth == 3] = 1  # the last class is found, and nowhere
    counts = segmentation.Counts(
        *(
            np.array([np.sum(where & (of == k)) for k in range(5)])
            for where, of in ((truth == found, truth), (True, truth), (True, found))
        )
    )
    sums = {"counts": counts, "loss": 3.0, "examples": 2.0}
    figures = segmentation.Segmentation.metrics(None, sums, None)
    there = [0, 1, 2, 3]
    wanted = jaccard_score(truth, found, labels=there, average=None, zero_division=0)
    assert figures["mIoU"] == pytest.approx(100 * wanted.mean())  # class 4 is neither there nor found
    assert figures["mAcc"] == pytest.approx(100 * recall_score(truth, found, labels=[0, 1, 2], average="macro"))
    assert figures["aAcc"] == pytest.approx(100 * accuracy_score(truth, found))


def test_the_worst_images_are_kept():
    truth = np.zeros((5, 2, 2), np.uint8)
    truth[4] = 255  # nothing counts
    found = truth.copy()
    found[1, 0, 0], found[3] = 1, 1
    size = np.full((5, 2), 2)
    rows = {"image": np.zeros((5, 2, 2, 3), np.uint8), "label_map": truth, "weight": np.ones(5)}
    rows |= {"size": size, "original": size}
    worst = segmentation.Worst()
    worst.add(rows, np.concatenate([found, found]), slice(5, 10))
    assert [one[:2] for one in worst.kept] == [(0.0, 3), (0.75, 1), (1.0, 0), (1.0, 2), (1.0, 4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "scenes"
    return workdir, *scene_runs.trained(small, workdir)


def test_a_run_leaves_label_maps_and_figures(trained):
    workdir, figures, evaluated, told = trained
    assert figures == evaluated
    assert figures["examples"] == 6
    assert f"mIoU {figures['mIoU']:.2f} %" in told
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "aux_loss", "accuracy"} <= rows[0].keys()
    assert (workdir / "label_maps.png").is_file()
    assert "mIoU" in (workdir / "report.html").read_text()
    with (workdir.with_name("evaluated") / "per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["ground", *"0123456789"]
    assert sum(int(row["pixels"]) for row in table) == 6 * 128 * 128
    overlaps = [float(row["IoU"]) for row in table if row["IoU"]]
    assert np.mean(overlaps) == pytest.approx(figures["mIoU"], abs=0.01)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("data", "mixup", 0.2, "data.mixup is for images of one class"),
        ("data", "image_size", 64, "128 pixels a side"),
        ("segmenter", "width", 0, "segmenter.width=0"),
    ],
)
def test_mistakes_get_one_line(part, field, value, message):
    config = small()
    setattr(getattr(config, part), field, value)
    with pytest.raises(UserError, match=message):
        task_of(config)
