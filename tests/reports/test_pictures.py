"""Pictures that show what they claim, asked of the figures that are drawn."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from evmamba_jax.reports.confusion import confusion
from evmamba_jax.reports.curves import curves
from evmamba_jax.reports.detections import Boxes, draw_detections, draw_found_boxes
from evmamba_jax.reports.drawing import COLOURS
from evmamba_jax.reports.predictions import guesses, predictions
from evmamba_jax.reports.writer import Reporter


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn, as matplotlib objects, so that tests can ask what is in them."""
    drawn = []
    save = Figure.savefig

    def note(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note)
    return drawn


def log(folder: Path, steps) -> None:
    report = Reporter(folder, total_steps=300, steps_per_epoch=7.5, is_main=True)
    for step in steps:
        report.log_train(step, {"loss": np.float32(1 / step), "lr": 1e-3 / 3, "box": step}, {})
        if step % 100 == 0:
            report.log_eval(step, {"top1": 100 * (1 - 1 / step), "ema_top1": 90.0, "examples": 360})
    report.close()


def test_curves_show_the_figures(tmp_path, figures):
    log(tmp_path, range(10, 301, 10))
    curves(tmp_path, "top1", "top-1 (%)")
    loss, top1, rate = figures[0].axes
    (line,) = loss.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(10, 301, 10))
    np.testing.assert_array_equal(line.get_ydata(), (1 / np.arange(10, 301, 10)).astype(np.float32))
    assert {line.get_label(): list(line.get_ydata()) for line in top1.lines} == {
        "weights": [99.0, 99.5, 100 * (1 - 1 / 300)],
        "moving average": [90.0, 90.0, 90.0],
    }
    assert set(rate.lines[0].get_ydata()) == {1e-3 / 3}
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("steps", [[], [10], [100]], ids=["no metrics", "no evaluation", "one evaluation"])
def test_curves_of_short_runs(tmp_path, figures, steps):
    log(tmp_path, steps)
    curves(tmp_path, "top1", "top-1 (%)")
    evaluated = steps == [100]
    top1 = figures[0].axes[1]
    assert [line.get_marker() for line in top1.lines] == (["o", "o"] if evaluated else []), "one point needs a marker"
    assert [text.get_text() for text in top1.texts] == ([] if evaluated else ["nothing yet"])
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_of_any_figure_and_of_the_parts_of_a_loss(tmp_path, figures):
    report = Reporter(tmp_path, total_steps=9, steps_per_epoch=3, is_main=True)
    for step in (3, 6):
        report.log_train(step, {"loss": 3.0 + step, "lr": 0.1, "boxes": 1.0 + step, "classes": 2.0}, {})
        report.log_eval(step, {"ap": step / 10, "ap50": step / 5, "examples": 5})
    report.close()
    curves(tmp_path, "ap", "AP", ("boxes", "classes"))
    loss, ap, _ = figures[0].axes[:3]
    assert ap.get_title(loc="left") == "AP"
    assert {line.get_label(): list(line.get_ydata()) for line in ap.lines} == {"weights": [0.3, 0.6]}
    drawn = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert drawn == {"loss": [6, 9], "boxes": [4, 7], "classes": [2, 2]}
    assert len({line.get_color() for line in loss.lines}) == 3


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (224, 3)])
def test_predictions_show_wrong_ones_first(tmp_path, figures, side, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, side, side, channels), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    predicted = labels.copy()
    predicted[[2, 7]] = [0, 2]
    probabilities = np.array([0.9, 0.8, 0.61, 0.7, 0.95, 0.52, 0.99, 0.87, 0.6, 0.75, 0.85])
    predictions(tmp_path, images, labels, predicted, probabilities, ["cat", "dog", "a very long name indeed"])
    (figure,) = figures
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == [
        "✗ a very long … 87%\ntruth: dog",
        "✗ cat 61%\ntruth: a very long …",
        "✓ a very long … 52%",
        "✓ a very long … 60%",
    ]
    assert titles[10:] == ["✓ cat 99%", *[""] * 5]
    assert "11 test images: 2 wrong (✗), 9 right (✓)" in figure.get_suptitle()
    for axes, index in zip(figure.axes, (7, 2, 5, 8), strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), images[index].squeeze())
    assert figure.axes[0].images[0].get_interpolation() == ("nearest" if side == 8 else "antialiased")
    with PIL.Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 1000


def test_predictions_that_are_all_right(tmp_path, figures):
    predictions(tmp_path, np.zeros((1, 8, 8, 3), np.uint8), np.array([0]), np.array([0]), np.array([1.0]), ["zero"])
    assert figures[0].axes[0].get_title() == "✓ zero 100%"


def test_confusion_of_few_classes_shows_every_number(tmp_path, figures):
    counts = np.array([[7, 2, 0], [0, 9, 1], [0, 0, 0]])
    confusion(tmp_path, counts, ["cat", "dog", "a bird without images"], "tiny of runs/x")
    (figure,) = figures
    assert figure.get_suptitle() == "tiny of runs/x\n16 of 19 images right (84.2%)"
    (axes,) = figure.axes
    drawn = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert drawn == {(0, 0): "7", (1, 1): "9", (0, 1): "2", (1, 2): "1"}  # by true class, class it was taken for
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["cat (78%)", "dog (90%)", "a bird without im… (no images)"]
    assert (tmp_path / "confusion.png").stat().st_size > 0


def test_confusion_of_many_classes_names_the_mistakes(tmp_path, figures):
    side = 450
    counts = np.diag(np.full(side, 50))
    counts[3, [3, 400]] = 30, 20
    counts[400, [400, 3]] = 45, 5
    counts[7] = 0
    confusion(tmp_path, counts, [f"name{k}, synonym" if k else "0" for k in range(side)], "tiny")
    (figure,) = figures
    table, pairs, weak, _ = figure.axes
    blocks = np.asarray(table.images[0].get_array())
    assert blocks.shape == (150, 150)  # of three classes
    assert {place: blocks[place] for place in zip(*map(list, np.nonzero(blocks)), strict=True)} == {
        (1, 133): 20,
        (133, 1): 5,
    }
    assert [text.get_text().strip() for text in pairs.texts] == [
        "3 name3, synonym → 400 name400, synonym",
        "40%  20 of 50",
        "400 name400, synonym → 3 name3, synonym",
        "10%  5 of 50",
    ]
    weakest = [text.get_text().strip() for text in weak.texts]
    assert weakest[:4] == [
        "3 name3, synonym",
        "60%  30 of 50; 20 as 400 name400, synonym",
        "400 name400, synonym",
        "90%  45 of 50; 5 as 3 name3, synonym",
    ]
    assert weakest[4] == "0"  # the rest is right, and class 7 has no images
    assert not any(text.startswith("7 ") for text in weakest)


def test_confusion_without_a_mistake(tmp_path, figures):
    confusion(tmp_path, np.diag(np.full(31, 2)), list(map(str, range(31))), "tiny")
    assert "62 of 62 images right (100.0%)" in figures[0].get_suptitle()
    assert not figures[0].axes[1].texts


def test_guesses_show_the_images_and_the_most_probable(tmp_path, figures):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    shares = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.0, 0.0, 1.0]])
    guesses(tmp_path / "out.png", images, ["a.png", "b.png", "c.png"], shares, ["cat", "dog", "2"], 2)
    axes = figures[0].axes
    assert [each.get_title(loc="left") for each in axes[::2]] == ["a.png", "b.png", "c.png", ""]
    for each, image in zip(axes[::2], images, strict=False):
        np.testing.assert_array_equal(each.images[0].get_array(), image[..., 0])
    bars = [[text.get_text().strip() for text in each.texts] for each in axes[1::2]]
    assert bars == [["1 dog", "70%", "2", "20%"], ["0 cat", "50%", "2", "30%"], ["2", "100%", "0 cat", "0%"], []]


def test_masks_lie_half_transparent_over_their_images_the_surest_on_top(tmp_path, figures):
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 2:10, 3:12], masks[1, 5:15, 8:20] = True, True
    boxes = Boxes(np.array([[3.0, 2, 12, 10], [8, 5, 20, 15]]), np.array([1, 0]), np.array([0.9, 0.5]), masks)
    image, bare = np.zeros((20, 30, 3), np.uint8), boxes._replace(masks=None)
    draw_found_boxes(tmp_path / "found.png", [(image, boxes, "one"), (image, bare, "two")], ["a", "b"])
    draw_detections(tmp_path / "detections.png", [(image, boxes, boxes, "right")], ["a", "b"])
    for panels, colours in ((figures[0].axes[:1], COLOURS[1::-1]), (figures[1].axes[:2], COLOURS[:2])):
        for axes in panels:
            over = np.asarray(axes.images[1].get_array())
            assert (over[..., 3] == 0.5 * masks.any(0)).all()
            np.testing.assert_allclose(over[masks[0], :3], np.broadcast_to(to_rgb(colours[0]), (72, 3)))
            np.testing.assert_allclose(over[12, 15, :3], to_rgb(colours[1]))
    assert len(figures[0].axes[1].images) == 1
