"""The pages of ``docs/`` that hold Python run as printed, block after block, and say what they print."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_scan_orders_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it writes its picture where it runs
    names: dict = {}
    for block in python_blocks("scan_orders.md"):
        exec(block, names)
        promised = re.findall(r"^print\(.*\)  # (.*?)(?::.*)?$", block, re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        assert printed[: len(promised)] == promised
    assert re.match(r"loss 2\.[23]", printed[-1])  # ten classes, nothing known: log 10
    assert np.mean(names["losses"][-10:]) < 0.8
    assert names["accuracy"] > 0.75

    # The picture of the page is what its code draws; another version of matplotlib may place a line otherwise.
    drawn, kept = (Image.open(path).convert("L") for path in (tmp_path / "scan_orders.png", DOCS / "scan_orders.png"))
    sizes = np.array([drawn.size, kept.size])
    assert abs(sizes[0] - sizes[1]).max() < 0.05 * sizes.max()
    small = [np.asarray(image.resize((200, 50)), float) for image in (drawn, kept)]
    assert abs(small[0] - small[1]).mean() < 8
    assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.9


def test_models_runs_as_printed():
    names: dict = {}
    for block in python_blocks("models.md"):
        exec(block, names)
    assert names["logits"].shape == (2, 10)


@pytest.mark.parametrize("page", ["pruning.md", "experiments.md", "segmentation.md", "detection.md", "analysis.md"])
def test_a_page_runs_as_printed(page, capsys):
    names: dict = {}
    for block in python_blocks(page):
        exec(block, names)
        promised = re.findall(r"^print\(.*\)  # (.*?)$", block, re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md") if path.stem != "index"))
def test_every_page_is_found_from_the_readme(page):
    assert f"](docs/{page})" in (DOCS.parent / "README.md").read_text()
