"""Two models on the same images: counts by a loop, McNemar's test by fractions; the command; mistakes in one line."""

import csv
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from PIL import Image
from saved_runs import DIGITS, PETS, classifier, save_run

from evmamba_jax.analysis import compare_models
from evmamba_jax.analysis.__main__ import main
from evmamba_jax.analysis.compare import Example, draw_comparison
from evmamba_jax.data.sources import open_source
from evmamba_jax.errors import UserError
from evmamba_jax.preprocessing import preprocess
from evmamba_jax.weights import open_model


def mcnemar(b: int, c: int) -> Fraction:
    """Return the p-value of the exact test by its definition: both tails of a fair coin's throws."""
    heads = [Fraction(math.comb(b + c, i), 2 ** (b + c)) for i in range(b + c + 1)]
    return sum((p for p in heads if p <= heads[b]), Fraction(0))


@pytest.mark.parametrize(("seed", "skill"), [(0, (0.9, 0.7)), (1, (0.5, 0.5)), (2, (0.2, 0.95))])
def test_counts_are_those_of_a_loop(seed, skill):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 60)  # of five classes: the last has no image
    first, second = (np.where(rng.random(60) < share, labels, rng.integers(0, 5, 60)) for share in skill)
    found = compare_models(labels, first, second, 5)
    table, only, hits = [[0, 0], [0, 0]], ([], []), [[[], []] for _ in range(5)]
    for i in range(60):
        a, b = first[i] == labels[i], second[i] == labels[i]
        table[not a][not b] += 1
        if a != b:
            only[bool(b)].append(i)
        hits[labels[i]][0].append(a)
        hits[labels[i]][1].append(b)
    assert found.counts.tolist() == table
    assert (found.only_first.tolist(), found.only_second.tolist()) == only
    assert found.agreement == sum(a == b for a, b in zip(first, second, strict=True)) / 60
    assert found.accuracies == pytest.approx(((table[0][0] + table[0][1]) / 60, (table[0][0] + table[1][0]) / 60))
    assert found.images.tolist() == [len(right) for right, _ in hits]
    np.testing.assert_allclose(found.by_class[:4], [[np.mean(own) for own in pair] for pair in hits[:4]])
    assert np.isnan(found.by_class[4]).all()
    assert found.p_value == pytest.approx(float(mcnemar(len(only[0]), len(only[1]))))


def test_models_that_never_differ_do_not_differ():
    labels = np.array([0, 1, 1])
    found = compare_models(labels, labels, labels, 2)
    assert found.p_value == 1
    assert found.agreement == 1
    with pytest.raises(UserError, match="3 labels, 2 and 3 answers"):
        compare_models(labels, labels[:2], labels, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two runs on digits with initial values, and one on other classes."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        save_run(folder / "a", classifier(), DIGITS, 0),
        save_run(folder / "b", classifier(), DIGITS, 1),
        save_run(folder / "other", classifier(), PETS, 0),
    ]


def refused(capsys, *arguments) -> str:
    assert main(["compare", *map(str, arguments)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_command_on_the_data_of_a_run(runs, tmp_path, capsys):
    out, table = tmp_path / "new" / "c.png", tmp_path / "c.csv"
    assert main(["compare", *map(str, runs[:2]), "--out", str(out), "--csv", str(table)]) == 0
    said = capsys.readouterr().out
    data = classifier().data
    source = open_source(data, data.eval_split)
    records = [source[i] for i in range(len(source))]
    images = preprocess([record["image"] for record in records], data)
    labels = np.array([record["label"] for record in records])
    found = [np.asarray(jax.jit(open_model(run)[0].__call__)(images)).argmax(1) for run in runs[:2]]
    right = [answers == labels for answers in found]
    assert f"the same answer {(found[0] == found[1]).mean():.2%}" in said
    assert f"A right {right[0].mean():.2%}, B right {right[1].mean():.2%}" in said
    only = [np.flatnonzero(right[i] & ~right[1 - i]) for i in (0, 1)]
    assert f"only A {len(only[0]):,}, only B {len(only[1]):,}" in said
    assert f"p = {float(mcnemar(len(only[0]), len(only[1]))):.3g}" in said
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [records[i]["id"] for part in only for i in part]
    assert [row["right"] for row in rows] == ["A"] * len(only[0]) + ["B"] * len(only[1])
    assert [int(row["b"]) for row in rows] == [found[1][i] for part in only for i in part]
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_the_command_on_a_folder_whose_classes_come_in_another_order(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("dog", "cat"):  # "bird" has no picture
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 255, (9, 9), np.uint8)).save(tmp_path / "pets" / name / f"{number}.png")
    (tmp_path / "pets" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert main(["compare", str(runs[2]), str(runs[2]), "--data", "pets"]) == 0
    told = capsys.readouterr()
    assert ": 3 images" in told.out
    assert "left out: 1 of 4 images" in told.err
    rows = [line.split() for line in told.out.splitlines()]
    assert [row[:3] for row in rows if "%" in row[-1] and row[1] in PETS] == [["0", "cat", "2"], ["1", "dog", "1"]]


def test_mistakes_are_told_in_one_line(runs, tmp_path, capsys):
    assert "tell other classes apart (10: 0, 1, 2, ... and 3: cat, dog, bird)" in refused(capsys, runs[0], runs[2])
    assert "nowhere" in refused(capsys, runs[0], "nowhere")
    assert "is no training run" in refused(capsys, "evmamba_t", "evmamba_t")
    (tmp_path / "flat").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "flat" / "a.png")
    assert "no pictures in train/CLASS/" in refused(capsys, runs[0], runs[1], "--data", tmp_path / "flat")
    (tmp_path / "fish" / "eel").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "fish" / "eel" / "a.png")
    assert "eel" in refused(capsys, runs[0], runs[1], "--data", tmp_path / "fish")
    assert "does not exist" in refused(capsys, runs[0], runs[1], "--data", tmp_path / "nowhere")


def test_the_picture_shows_the_examples(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("evmamba_jax.analysis.compare.save", lambda figure, path: drawn.append(figure))
    labels, first, second = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1]), np.array([1, 1, 1, 1])
    image = np.zeros((5, 5, 1), np.uint8)
    only_a = Example(image, 0, (0, 1), (0.9, 0.6))
    only_b = Example(image, 1, (0, 1), (0.8, 0.7))
    draw_comparison(tmp_path / "c.png", compare_models(labels, first, second, 2), "AB", [[only_a], [only_b]], "pq")
    (figure,) = drawn
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [words[i] for i in (0, 2, 4, 6)] == ["1", "1", "1", "1"]
    assert words[8:] == ["A ✓ p 90%", "B ✗ q 60%", "A ✗ p 80%", "B ✓ q 70%"]
