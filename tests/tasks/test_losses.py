"""Losses by name and class, against timm's and torch's recorded values; balanced classes; several labels an image."""

import contextlib
import csv
import io
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from evmamba_jax import predict
from evmamba_jax.data import device
from evmamba_jax.data.__main__ import main as check
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.loader import train_batches
from evmamba_jax.errors import UserError
from evmamba_jax.tasks import task_of
from evmamba_jax.tasks.classification import Classification, binary_cross_entropy, cross_entropy
from evmamba_jax.tasks.multilabel import Scores
from evmamba_jax.training import Config, loop, run
from evmamba_jax.training.config import Duration
from evmamba_jax.weights.load import open_place

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "training"))

from tiny import get_config  # noqa: E402

RECORDED = json.loads((ROOT / "tests" / "golden" / "training" / "optim.json").read_text())["losses"]
LOGITS, LABELS, WEIGHTS, SOFT = (np.float32(RECORDED[name]) for name in ("logits", "labels", "weights", "soft"))


def test_losses_are_timms_and_torchs():
    smooth = device.one_hot_smooth(LABELS.astype(np.int32), 5, 0.1)
    for name, found in {
        "bce": binary_cross_entropy(LOGITS, smooth),
        "bce_soft": binary_cross_entropy(LOGITS, SOFT),
        "bce_weighted": binary_cross_entropy(LOGITS, SOFT, WEIGHTS),
        "cross_entropy_weighted": cross_entropy(LOGITS, SOFT, WEIGHTS),
    }.items():
        np.testing.assert_allclose(found.mean(), RECORDED[name], rtol=2e-6, err_msg=name)


class Labelled(list):
    """A split of black images of these labels, a third of which are of class 2, and none of class 1."""

    name, split, class_names = "labelled", "train", ("a", "b", "c")

    def __getitem__(self, index):
        png = io.BytesIO()
        Image.new("L", (8, 8)).save(png, "PNG")
        return {"image": png.getvalue(), "label": super().__getitem__(index), "id": str(index)}


def small(**loss):
    config = get_config("convolutions")
    for name, value in loss.items():
        setattr(config.loss, name, value)
    return config


def test_balanced_weights_are_sklearns():
    labels = [0, 0, 2, 0, 2, 0]
    task = Classification(small(balanced=True), Labelled.class_names)
    task.see(Labelled(labels))
    wanted = compute_class_weight("balanced", classes=np.array([0, 2]), y=labels) * 2 / 3  # of three classes, not two
    np.testing.assert_allclose(task._weights, [wanted[0], 0, wanted[1]], rtol=1e-6)


def test_class_weights_of_another_length_and_two_ways_at_once():
    with pytest.raises(UserError, match="class_weights has 2 numbers, and digits has 3 classes: give one a class"):
        Classification(small(class_weights=(1.0, 2.0)), Labelled.class_names)
    with pytest.raises(UserError, match="leave config.loss.class_weights out"):
        task_of(small(class_weights=(1.0, 2.0), balanced=True))


def test_balanced_drawing_is_even_and_a_function_of_the_step():
    labels = [0] * 90 + [1] * 10
    source = Labelled(labels)
    config = DataConfig(image_size=8, in_channels=1, mean=(0.5,), std=(0.5,), balanced=True, num_threads=1)

    def drawn(start, steps, **place):
        with train_batches(config, source, seed=3, global_batch=50, start_step=start, **place) as batches:
            return np.concatenate([next(batches)["label"] for _ in range(steps)])

    whole = drawn(0, 8)
    assert abs((whole == 1).mean() - 0.5) < 0.08  # of 400 draws; without balance it is 0.1
    np.testing.assert_array_equal(whole[200:], drawn(4, 4))
    halves = [drawn(4, 4, process_index=i, process_count=2).reshape(4, 25) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1).ravel(), whole[200:])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Pictures that are red, green, both (yellow) or neither (black), with a table of labels."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    rows = []
    for k in range(96):
        red, green = rng.integers(0, 2, 2)
        pixels = np.zeros((10, 10, 3), np.uint8)
        pixels[..., :2] = np.array([red, green]) * 200 + rng.integers(0, 50, (10, 10, 2))
        Image.fromarray(pixels).save(folder / f"{k}.png")
        labels = ";".join(name for name, on in (("red", red), ("green", green)) if on)
        rows.append((f"{k}.png", labels, "train" if k < 64 else "validation"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return folder / "labels.csv"


def of_colours(table):
    config = get_config("convolutions")
    config.task, config.loss.name = "multilabel", "bce"
    fields = {"name": "table", "data_dir": str(table), "eval_split": "validation", "in_channels": 3, "mixup": 0.2}
    fields |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "label_smoothing": 0.0, "cutmix": 0.0, "random_erasing": 0.0}
    for name, value in fields.items():
        setattr(config.data, name, value)
    config.optim.lr, config.duration = 1e-2, Duration(steps=60)
    return config


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "colours"
    with contextlib.redirect_stdout(io.StringIO()) as told, mock.patch.object(loop, "_draw"):
        figures = run(of_colours(table), workdir)
    return workdir, figures, told.getvalue()


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_several_labels_are_learned_evaluated_and_predicted(table, trained, tmp_path, capsys):
    workdir, figures, told = trained
    assert figures["mAP"] > 95, told
    config = of_colours(table)
    config.eval_only, config.init_from = True, str(workdir)
    run(config, tmp_path / "evaluated")
    assert [row["name"] for row in rows_of(tmp_path / "evaluated" / "per_class.csv")] == ["green", "red"]
    images = [str(table.parent / f"{k}.png") for k in range(64, 96)]
    answers = ("--csv", str(tmp_path / "answers.csv"), "--out", str(tmp_path / "picture.png"))
    assert predict.main(["--weights", str(workdir), *answers, *images]) == 0, capsys.readouterr()
    truth = {row["path"]: set(filter(None, row["label"].split(";"))) for row in rows_of(table)}
    right = 0
    for row in rows_of(tmp_path / "answers.csv"):
        said = {row[f"name_{i}"] for i in (1, 2) if float(row[f"probability_{i}"]) > 0.5}
        right += said == truth[Path(row["image"]).name]
    assert right >= 28  # of 32; both labels at once, or none, can be told only where each has its own probability


def test_data_check_takes_several_labels_as_they_are(table, capsys):
    assert check(["check", str(table)]) == 0
    told = capsys.readouterr().out
    assert "2 classes; pictures: 64 in train, 32 in validation" in told
    assert "pictures have several labels, or none: " in told


def test_average_precision_by_hand():
    scores = Scores()
    answers = {
        "scores": np.float32([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.3, 0.5], [0.6, 0.4, 0.5], [1, 1, 1]]),
        "labels": np.float32([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        "weight": np.float32([1, 1, 1, 1, 0]),  # the last is padding
    }
    scores.add({}, answers, slice(None))
    np.testing.assert_allclose(scores.average_precisions(), [(1 + 2 / 3) / 2, 1, np.nan])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss.name", "cross_entropy", "config.task=multilabel needs config.loss.name=bce; it is cross_entropy"),
        ("data.balanced", True, "config.task=multilabel needs config.data.balanced=False; it is True"),
        ("data.name", "digits", "has one label an image; several are read from a table of your own pictures"),
    ],
)
def test_what_several_labels_cannot_have_gets_one_line(table, tmp_path, name, value, message):
    config = of_colours(table)
    part, field = name.split(".")
    setattr(getattr(config, part), field, value)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)


def test_one_label_each_is_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("path,label\na.png,cat\n")
    with pytest.raises(UserError, match="every picture of .* has one label: set config.task=classification"):
        run(of_colours(tmp_path / "labels.csv"), tmp_path / "run")


def stopping_early(workdir, patience, steps=40):
    config: Config = get_config("convolutions")
    config.early_stopping, config.optim.lr, config.optim.min_lr = patience, 1e-12, 1e-12  # nothing gets better
    config.optim.warmup_lr, config.duration, config.eval_every = 1e-12, Duration(steps=steps), Duration(steps=5)
    config.optim.warmup, config.optim.ema_decay = Duration(steps=2), 0.0
    with contextlib.redirect_stdout(io.StringIO()) as told:
        run(config, workdir)
    return told.getvalue()


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(tmp_path):
    told = stopping_early(tmp_path / "run", 2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = max(steps)
    assert last < 40
    assert f"early stopping: 2 evaluations found nothing better than step {last - 10}" in told
    assert (tmp_path / "run" / "predictions.png").is_file()  # it ends as a whole run does
    assert f"has ended at step {last}" in stopping_early(tmp_path / "run", 2)
    stopping_early(tmp_path / "run", 3)  # more patience goes on
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) > last


def test_a_run_with_early_stopping_stands_for_its_best_checkpoint(tmp_path, monkeypatch):
    found = iter([30.0, 70.0, 50.0, 60.0, 90.0])  # the last is of the best checkpoint, for the report
    monkeypatch.setattr(Classification, "metrics", lambda *_: {"top1": next(found), "top5": 99.0, "eval_loss": 1.0})
    told = stopping_early(tmp_path / "run", 2)
    assert "early stopping: 2 evaluations found nothing better than step 10" in told
    assert "the run stands for step 10, the best" in told
    assert "step 10: top-1 90.00 %" in told.splitlines()[-1]
    assert "<p>top-1 90.00 %" in (tmp_path / "run" / "report.html").read_text()
    weights = open_place(tmp_path / "run").weights
    assert Path(weights.place).name == "10"
    assert weights.meta["figures"]["top1"] == 70.0
    assert "has ended at step 20: top-1 70.00 %" in stopping_early(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10" / "model")  # then the newest
    assert Path(open_place(tmp_path / "run").weights.place).name == "20"


def test_patience_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="early_stopping is 8, and the run has 8 evaluations"):
        stopping_early(tmp_path / "run", 8)
