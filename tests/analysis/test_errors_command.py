"""The command ``errors``: figures of an evaluation by itself, files and pictures, mistakes in one line."""

import json

import numpy as np
import pytest
from PIL import Image
from saved_runs import DIGITS, PETS, classifier, detector, likely, save_run, segmenter

from evmamba_jax.analysis import detection_errors
from evmamba_jax.analysis.__main__ import main
from evmamba_jax.data import scenes
from evmamba_jax.data.scenes import GROUND, scene
from evmamba_jax.dense import DensePredictor
from evmamba_jax.detection.evaluate import Truth

SCENES = 6


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "LENGTHS", {"train": 4, "test": SCENES})


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Return a detector that was never trained, and its predictor."""
    run = save_run(tmp_path_factory.mktemp("runs") / "boxes", detector(init_std=0.12), DIGITS, change=likely)
    return run, DensePredictor(run)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Return a segmenter that was never trained, and its predictor."""
    run = save_run(tmp_path_factory.mktemp("runs") / "maps", segmenter(), (GROUND, *DIGITS))
    return run, DensePredictor(run)


def told(monkeypatch, capsys, run, predictor, *options):
    """Run the command with a predictor that is compiled already; return what it prints."""
    monkeypatch.setattr("evmamba_jax.analysis.errors.DensePredictor", lambda place, name: predictor)
    assert main(["errors", str(run), *map(str, options)]) == 0
    return capsys.readouterr().out


def test_a_detector(boxes, tmp_path, capsys, monkeypatch):
    out, table = tmp_path / "new" / "e.png", tmp_path / "e.json"
    said = told(monkeypatch, capsys, *boxes, "--out", out, "--json", table)
    _, predictor = boxes
    shown = [scene("test", i) for i in range(SCENES)]
    truths = [
        Truth(one.boxes, one.labels, np.zeros(len(one.labels), bool), one.masks.sum((1, 2)).astype(float))
        for one in shown
    ]
    expected = detection_errors(truths, [predictor(one.image) for one in shown])
    assert f"AP at an overlap of 0.5: {expected.ap:.2f} %" in said
    figures = json.loads(table.read_text())
    assert figures["images"] == SCENES
    assert {kind: row["count"] for kind, row in figures["kinds"].items()} == {
        kind: int(count.sum()) for kind, count in expected.counts().items()
    }
    assert sum(row["count"] for row in figures["kinds"].values()) > 50  # there is something to count
    rows = {line.split()[0]: line.split() for line in said.splitlines()}
    counts = expected.counts()["missed"]
    assert rows["missed"][1:] == [f"{expected.gains['missed']:.2f}", str(counts.sum()), *map(str, counts)]
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_a_segmenter(maps, tmp_path, capsys, monkeypatch):
    out, table = tmp_path / "e.png", tmp_path / "e.json"
    said = told(monkeypatch, capsys, *maps, "--out", out, "--json", table)
    _, predictor = maps
    shown = [scene("test", i) for i in range(SCENES)]
    wrong = sum(int((predictor(one.image) != one.label_map).sum()) for one in shown)
    pixels = SCENES * 128 * 128
    assert f"{wrong / pixels:.2%} of {pixels:,} pixels wrong" in said
    figures = json.loads(table.read_text())
    assert (figures["pixels"], figures["wrong"]) == (pixels, wrong)
    assert sum(pair["pixels"] for pair in figures["confused"]) == wrong
    assert figures["near_border"]["pixels"] + figures["inside"]["pixels"] == pixels
    assert out.exists()


def refused(capsys, *arguments) -> str:
    assert main(["errors", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_told_in_one_line(maps, tmp_path, capsys):
    run, _ = maps
    assert "names the classes of whole images" in refused(capsys, save_run(tmp_path / "a", classifier(), DIGITS))
    assert "'nowhere' is neither a model" in refused(capsys, "nowhere")
    assert "is no folder" in refused(capsys, run, "--data", tmp_path / "nowhere")
    assert "split 'validation'" in refused(capsys, run, "--split", "validation")
    assert "has 11 classes and the model 3" in refused(capsys, save_run(tmp_path / "b", segmenter(), PETS))
    (tmp_path / "empty").mkdir()
    assert "not prepared" in refused(capsys, run, "--data", tmp_path / "empty")
