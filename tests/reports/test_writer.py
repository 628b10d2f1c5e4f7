"""The writer of a run: figures that come back bit for bit, files that survive kills."""

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
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from evmamba_jax.errors import UserError
from evmamba_jax.reports.writer import Reporter, read_rows


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
from evmamba_jax.reports.writer import Reporter
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
from evmamba_jax.reports.writer import Reporter
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


def test_metrics_are_json_lines(tmp_path):
    report = reporter(tmp_path)
    log(report, [100])
    report.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert all(isinstance(value, int | float) for value in json.loads(line).values())
