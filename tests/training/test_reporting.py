"""Reports: figures that come back bit for bit, files that survive kills, and pictures that show what they claim."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event, SessionLog

from evmamba_jax.errors import UserError
from evmamba_jax.training import pictures
from evmamba_jax.training.reporting import Reporter, read_rows


def reporter(folder: Path, **changes) -> Reporter:
    return Reporter(folder, **({"total_steps": 300, "steps_per_epoch": 7.5, "is_main": True} | changes))


def log(report: Reporter, steps) -> None:
    for step in steps:
        figures = {"loss": np.float32(1 / step), "lr": 1e-3 / 3, "grad_norm": np.sqrt(step)}
        report.log_train(step, figures, {"images_per_second": 812.4, "input_wait": 0.01})
        if step % 100 == 0:
            report.log_eval(step, {"top1": 100 * (1 - 1 / step), "ema_top1": 90.0, "examples": 360})


def events_of(folder: Path) -> list[Event]:
    """Read TFRecords by their layout: length, its checksum, data, their checksum."""
    events = []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_figures_come_back_bit_for_bit(tmp_path):
    report = reporter(tmp_path)
    log(report, [99, 100])
    report.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 99, "epoch": 13.2, "loss": float(np.float32(1 / 99)), "lr": 1e-3 / 3, "grad_norm": 99**0.5},
        {"step": 100, "epoch": 100 / 7.5, "loss": float(np.float32(1 / 100)), "lr": 1e-3 / 3, "grad_norm": 10.0},
        {"step": 100, "epoch": 100 / 7.5, "top1": 99.0, "ema_top1": 90.0, "examples": 360.0},
    ]


def test_what_depends_on_the_clock_is_kept_apart(tmp_path):
    report = reporter(tmp_path)
    report.log_speed({"compile_seconds": 3.5})
    log(report, [10])
    report.close()
    assert read_rows(tmp_path / "speed.jsonl") == [
        {"step": 0, "compile_seconds": 3.5},
        {"step": 10, "images_per_second": 812.4, "input_wait": 0.01},
    ]
    assert "second" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    report = reporter(whole)
    log(report, range(10, 301, 10))
    report.close()

    for start, stop in ((0, 130), (100, 240), (200, 300)):  # each killed some way after its last checkpoint
        report = reporter(parts)
        report.rewind(start)
        if start:  # a run that had saved but not evaluated, or was killed while it noted that it had
            log_again = {"top1": 100 * (1 - 1 / start), "ema_top1": 90.0, "examples": 360}
            report.log_eval(start, log_again)
        log(report, range(start + 10, stop + 1, 10))
        report.close()
        if stop < 300:
            with (parts / "metrics.jsonl").open("a") as file:
                file.write('{"step": 2')
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_rewinding_to_the_start_forgets_everything_but_speed(tmp_path):
    report = reporter(tmp_path)
    log(report, [10, 20])
    report.close()
    report = reporter(tmp_path)
    report.rewind(0)
    report.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert len(read_rows(tmp_path / "speed.jsonl")) == 2


def test_a_half_written_line_does_not_spoil_the_next(tmp_path):
    (tmp_path / "speed.jsonl").write_text('{"step": 1, "input_wait": 0.5}\n{"step": 2, "inp')
    report = reporter(tmp_path)
    report.log_speed({"compile_seconds": 1.0})
    report.close()
    assert read_rows(tmp_path / "speed.jsonl") == [{"step": 1, "input_wait": 0.5}, {"step": 0, "compile_seconds": 1.0}]


def test_lines_survive_a_kill(tmp_path):
    code = """
import os, signal, sys
from evmamba_jax.training.reporting import Reporter
report = Reporter(sys.argv[1], total_steps=9, steps_per_epoch=3, is_main=True)
report.log_train(1, {"loss": 2.0, "lr": 0.1}, {"images_per_second": 5.0})
report.log_eval(1, {"top1": 50.0})
report.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert [set(row) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        {"step", "epoch", "loss", "lr"},
        {"step", "epoch", "top1"},
    ]
    tags = [event.summary.value[0].tag for event in events_of(tmp_path / "tensorboard") if event.summary.value]
    assert tags == ["train/loss", "train/lr", "speed/images_per_second", "eval/top1"]


def test_tensorboard_gets_all_figures_and_drops_what_a_resumed_run_repeats(tmp_path):
    report = reporter(tmp_path)
    log(report, [90, 100, 110])
    report.close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.0"))  # sorts before what the next start writes within this second
    report = reporter(tmp_path)
    report.rewind(100)
    log(report, [110])
    report.close()

    found: dict[str, dict[int, float]] = {}
    for event in events_of(tmp_path / "tensorboard"):
        if event.session_log.status == SessionLog.START:  # TensorBoard's rule
            for points in found.values():
                for step in [step for step in points if step >= event.step]:
                    del points[step]
        for value in event.summary.value:
            assert event.step not in found.setdefault(value.tag, {})
            found[value.tag][event.step] = value.simple_value
    assert found["train/loss"] == {step: np.float32(1 / step) for step in (90, 100, 110)}
    assert found["eval/top1"] == {100: np.float32(99.0)}
    assert found["speed/images_per_second"] == {step: np.float32(812.4) for step in (90, 100, 110)}


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    report = reporter(tmp_path)
    log(report, [100, 110])
    report.line("hello")
    report.summary("done")
    report.close()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "step 100/300 epoch 13.33 loss 0.0100 lr 3.33e-04 812 images/s input wait 1%"
    assert lines[1] == "step 100/300 epoch 13.33 evaluation: top1 99 ema_top1 90 examples 360"
    assert re.fullmatch(
        r"step 110/300 epoch 14.67 loss 0.0091 lr 3.33e-04 812 images/s input wait 1% left \d\d:\d\d", lines[2]
    )
    assert lines[3:] == ["hello", "done"]
    assert captured.err == ""


def test_a_bar_on_a_terminal(tmp_path):
    code = """
import sys
from evmamba_jax.training.reporting import Reporter
report = Reporter(sys.argv[1], total_steps=300, steps_per_epoch=7.5, is_main=True)
report.rewind(75)
for step in (150, 225):
    report.log_train(step, {"loss": 0.25, "lr": 1e-3}, {"images_per_second": 812.0})
report.line("above")
report.summary("done")
report.close()
"""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=theirs)
    os.set_blocking(ours, False)
    shown = os.read(ours, 100_000).decode()
    os.close(theirs)
    os.close(ours)
    assert done.stdout == b"above\ndone\n"
    assert "25%|" in shown
    for part in ("50%|", "150/300", "epoch 20 loss 0.2500 lr 1.00e-03 812 images/s", "75%|", "225/300", " left "):
        assert part in shown, shown


def test_only_the_main_process_writes(tmp_path, capsys):
    report = reporter(tmp_path / "work", is_main=False)
    report.rewind(0)
    log(report, [100])
    report.log_speed({"compile_seconds": 1.0})
    report.line("hello")
    report.flush()
    report.summary("done")
    report.close()
    assert not (tmp_path / "work").exists()
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file/work \(Not a directory\)"):
        reporter(tmp_path / "file" / "work")


# Pictures


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


def test_curves_show_the_figures(tmp_path, figures):
    report = reporter(tmp_path)
    log(report, range(10, 301, 10))
    report.close()
    pictures.curves(tmp_path)
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
    report = reporter(tmp_path)
    log(report, steps)
    report.close()
    pictures.curves(tmp_path)
    evaluated = steps == [100]
    top1 = figures[0].axes[1]
    assert [line.get_marker() for line in top1.lines] == (["o", "o"] if evaluated else []), "one point needs a marker"
    assert [text.get_text() for text in top1.texts] == ([] if evaluated else ["nothing yet"])
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (224, 3)])
def test_predictions_show_wrong_ones_first(tmp_path, figures, side, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, side, side, channels), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    predicted = labels.copy()
    predicted[[2, 7]] = [0, 2]
    probabilities = np.array([0.9, 0.8, 0.61, 0.7, 0.95, 0.52, 0.99, 0.87, 0.6, 0.75, 0.85])
    pictures.predictions(tmp_path, images, labels, predicted, probabilities, ["cat", "dog", "a very long name indeed"])
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
    pictures.predictions(
        tmp_path, np.zeros((1, 8, 8, 3), np.uint8), np.array([0]), np.array([0]), np.array([1.0]), ["zero"]
    )
    assert figures[0].axes[0].get_title() == "✓ zero 100%"


def test_confusion_of_few_classes_shows_every_number(tmp_path, figures):
    counts = np.array([[7, 2, 0], [0, 9, 1], [0, 0, 0]])
    pictures.confusion(tmp_path, counts, ["cat", "dog", "a bird without images"], "tiny of runs/x")
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
    pictures.confusion(tmp_path, counts, [f"name{k}, synonym" if k else "0" for k in range(side)], "tiny")
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
    pictures.confusion(tmp_path, np.diag(np.full(31, 2)), list(map(str, range(31))), "tiny")
    assert "62 of 62 images right (100.0%)" in figures[0].get_suptitle()
    assert not figures[0].axes[1].texts


def test_guesses_show_the_images_and_the_most_probable(tmp_path, figures):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    shares = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.0, 0.0, 1.0]])
    pictures.guesses(tmp_path / "out.png", images, ["a.png", "b.png", "c.png"], shares, ["cat", "dog", "2"], 2)
    axes = figures[0].axes
    assert [each.get_title(loc="left") for each in axes[::2]] == ["a.png", "b.png", "c.png", ""]
    for each, image in zip(axes[::2], images, strict=False):
        np.testing.assert_array_equal(each.images[0].get_array(), image[..., 0])
    bars = [[text.get_text().strip() for text in each.texts] for each in axes[1::2]]
    assert bars == [["1 dog", "70%", "2", "20%"], ["0 cat", "50%", "2", "30%"], ["2", "100%", "0 cat", "0%"], []]


def test_metrics_are_json_lines(tmp_path):
    report = reporter(tmp_path)
    log(report, [100])
    report.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert all(isinstance(value, int | float) for value in json.loads(line).values())
