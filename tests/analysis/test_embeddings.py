"""Features of pictures: what enters the head, in every form of file; what is told of classes; mistakes in one line."""

import importlib.util

import jax
import numpy as np
import pytest
from PIL import Image
from saved_runs import DIGITS, classifier, save_run

from evmamba_jax.analysis import knn_accuracy, linear_probe
from evmamba_jax.analysis.__main__ import main
from evmamba_jax.analysis.embeddings import Row, draw_neighbours
from evmamba_jax.analysis.labelled import Loose, told
from evmamba_jax.analysis.subjects import open_subject
from evmamba_jax.data.sources import open_source
from evmamba_jax.predict import pictures_in
from evmamba_jax.preprocessing import preprocess
from evmamba_jax.weights import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run on digits with initial values."""
    return save_run(tmp_path_factory.mktemp("runs") / "a", classifier(), DIGITS)


@pytest.fixture
def pets(tmp_path):
    """Return a folder of two classes, light and dark, six pictures to train on and two to validate each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, low in (("dark", 0), ("light", 180)):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 60, (10, 10), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pets"


def headless(place, images):
    """Return what enters the head of the model of a place."""
    model = open_model(place)[0]
    model.head = None
    return np.asarray(jax.jit(model.__call__)(images))


def test_the_data_of_a_run(run, tmp_path, capsys):
    out, picture = tmp_path / "new" / "f.npz", tmp_path / "n.png"
    assert main(["embeddings", str(run), "--out", str(out), "--picture", str(picture), "--k", "5"]) == 0
    said = capsys.readouterr().out
    data = classifier().data
    sources = [open_source(data, split) for split in (data.train_split, data.eval_split)]
    records = [source[i] for source in sources for i in range(len(source))]
    expected = headless(run, preprocess([record["image"] for record in records], classifier().data))
    with np.load(out) as kept:
        np.testing.assert_allclose(kept["embeddings"], expected, atol=1e-5)
        assert kept["images"].tolist() == [record["id"] for record in records]
        assert kept["labels"].tolist() == [record["label"] for record in records]
        assert kept["splits"].tolist() == ["train"] * 240 + ["evaluation"] * 80
        assert kept["class_names"].tolist() == list(DIGITS)
        features, labels = kept["embeddings"], kept["labels"]
    parts = features[:240], labels[:240], features[240:], labels[240:]
    assert f"5 nearest neighbours: {knn_accuracy(*parts, k=5):.2%} right" in said
    assert f"linear probe: {linear_probe(*parts).accuracy:.2%} right" in said
    with Image.open(picture) as drawn:
        assert drawn.width > 900


def test_a_folder_as_training_reads_it(run, pets, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "f.parquet"
    assert main(["embeddings", str(run), str(pets), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "images: 12 in train, 4 in validation, 2 classes" in said
    table = pyarrow.read_table(out).to_pydict()
    assert table["images"][:2] == ["train/dark/0.png", "train/dark/1.png"]
    assert table["classes"] == ["dark"] * 6 + ["light"] * 6 + ["dark"] * 2 + ["light"] * 2
    assert table["splits"] == ["train"] * 12 + ["validation"] * 4
    expected = headless(run, preprocess([pets / name for name in table["images"]], classifier().data))
    np.testing.assert_allclose(table["embeddings"], expected, atol=1e-5)


def test_pictures_of_no_class(run, pets, tmp_path, capsys):
    flat, out, picture = pets / "train" / "dark", tmp_path / "f.npz", tmp_path / "n.png"
    (flat / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert main(["embeddings", str(run), str(flat), "--out", str(out), "--picture", str(picture)]) == 0
    said = capsys.readouterr()
    assert "right" not in said.out
    assert "left out: 1 of 7 images" in said.err
    with np.load(out) as kept:
        assert kept["images"].tolist() == [str(flat / f"{i}.png") for i in range(6)]
        assert "labels" not in kept
    assert picture.exists()


def test_a_folder_of_loose_pictures_and_of_other_files(run, pets, tmp_path, capsys):
    light = pets / "val" / "light"
    (light / "notes").mkdir()
    (light / "notes" / "colours.txt").write_text("this one is light")
    assert main(["embeddings", str(run), str(light), "--out", str(tmp_path / "f.npz")]) == 0
    with np.load(tmp_path / "f.npz") as kept:
        assert kept["images"].tolist() == [str(light / f"{i}.png") for i in range(2)]


def test_a_model_without_a_head(run, pets):
    subject = open_subject(str(run))
    subject.model.head = None
    (batch,) = told(subject, Loose(list(pictures_in([str(pets / "val")]))))
    assert batch.scores is None
    expected = headless(run, preprocess([pets / "val" / name for name in batch.names], classifier().data))
    np.testing.assert_allclose(batch.embeddings, expected, atol=1e-5)


def refused(capsys, *arguments) -> str:
    assert main(["embeddings", *map(str, arguments)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_mistakes_are_told_in_one_line(run, pets, tmp_path, capsys, monkeypatch):
    assert "is no training run" in refused(capsys, "evmamba_t")
    assert "does not exist" in refused(capsys, run, tmp_path / "nowhere")
    assert "name --out or --picture" in refused(capsys, run, pets / "val" / "dark")
    assert "must end in .npz or .parquet" in refused(capsys, run, pets, "--out", "f.csv")
    assert "--k is 0" in refused(capsys, run, pets, "--k", 0)
    (pets / "train").rename(tmp_path / "train")
    assert "pictures in validation alone" in refused(capsys, run, pets)
    (pets / "val" / "light").rename(tmp_path / "light")
    assert "are of one class" in refused(capsys, run, pets)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    assert "is written with pyarrow" in refused(capsys, run, pets, "--out", "f.parquet")


def test_the_picture_marks_what_is_right_by_a_sign(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("evmamba_jax.analysis.embeddings.save", lambda figure, path: drawn.append(figure))
    image = np.zeros((4, 4, 1), np.uint8)
    rows = [Row(image, "cat", False, [(image, "dog", 0.9, False), (image, "cat", 0.8, True)])]
    draw_neighbours(tmp_path / "n.png", [*rows, Row(image, "a.png", None, [(image, "b.png", 0.7, None)])], "title")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes if axes.images]
    assert titles == ["✗ cat", "✗ dog 0.90", "✓ cat 0.80", "a.png", "b.png 0.70"]
