"""Whatever stops a run, starting it again gives the run that was never stopped, to the bit."""

import csv
import functools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import command
import numpy as np
import pytest
from command import TINY

from evmamba_jax.checkpoints import Checkpoints, load_model
from evmamba_jax.data.sources import prepare

# What a run restores knows of no layer: the model that starts fastest will do. test_end_to_end.py kills and resumes one
# with a scan, and tests/checkpoints kills seventeen lives without a compiler.
VARIANT = ":convolutions"
start, run_here, refused_here = (
    functools.partial(function, config=TINY + VARIANT)
    for function in (command.start, command.run_here, command.refused_here)
)

STEPS = 60
ARGUMENTS = (f"--config.duration.steps={STEPS}", "--config.save_every.steps=10", "--config.eval_every.steps=20")
OFTEN = "--config.save_every.steps=3"  # for lives that are short; how often a run saves changes nothing in it


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Return the arguments of all runs of this file, with data that they share."""
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return (*ARGUMENTS, f"--config.data.data_dir={folder}")


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run_here(*arguments, "--workdir", workdir, pictures=True)
    assert code == 0, out + err
    return workdir


def steps_on_disk(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def everything(workdir: Path) -> dict[str, np.ndarray]:
    """Return every array of the newest checkpoint: parameters, statistics, moving average."""
    arrays = {}
    for ema in (False, True):
        params, stats, meta = load_model(workdir, ema=ema)
        arrays |= {f"{ema} {name}": value for name, value in {**params, **stats}.items()}
    assert meta["step"] == STEPS
    return arrays


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_kills_at_random_moments_change_nothing(arguments, uninterrupted, tmp_path):
    """One in a save, as far as that can be hit, and one at any moment after it."""
    workdir = tmp_path / "run"
    chance = random.Random(0)
    for in_save in (True, False):
        before = steps_on_disk(workdir)
        process = start(*arguments, OFTEN, "--workdir", workdir)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if steps_on_disk(workdir) != before and (not in_save or any((workdir / "checkpoints").glob("*tmp*"))):
                break
            time.sleep(0.002)
        time.sleep(0 if in_save else chance.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended by itself: {out}{err}"
    assert steps_on_disk(workdir)[-1] < STEPS
    code, out, err = run_here(*arguments, "--workdir", workdir)
    assert code == 0, out + err
    assert_same_run(workdir, uninterrupted)


def test_sigterm_saves_and_the_next_start_continues(arguments, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(*arguments, "--workdir", workdir, "--config.save_every.steps=1000")
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, out + err
    (saved,) = steps_on_disk(workdir)
    assert f"SIGTERM: step {saved} is saved in {workdir}; the same command continues from there" in out
    # Between steps it is said that one is awaited; where the run waits for data there is none.
    assert not err or "SIGTERM: saving after this step; Ctrl-C leaves at once" in err
    code, out, err = run_here(*arguments, "--workdir", workdir)
    assert code == 0, out + err
    assert_same_run(workdir, uninterrupted)


def test_a_truncated_newest_checkpoint_is_named_and_the_one_before_used(arguments, uninterrupted, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before, newest = steps_on_disk(workdir)[-2:]
    largest = max((workdir / "checkpoints" / str(newest)).rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    code, out, err = run_here(*arguments, "--workdir", workdir)
    assert code == 0, out + err
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert f"continuing from {before}" in caplog.text
    assert_same_run(workdir, uninterrupted)


def test_a_finished_run_says_so_and_stays_as_it_is(arguments, uninterrupted):
    kept = (uninterrupted / "metrics.jsonl").read_bytes()
    code, out, err = run_here(*arguments, "--workdir", uninterrupted)
    assert code == 0, err
    assert f"has ended at step {STEPS}" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize(("name", "value", "old"), [("batch_size", 16, 32), ("seed", 1, 0)])
def test_what_orders_the_data_cannot_change(arguments, uninterrupted, name, value, old):
    line = refused_here(*arguments, f"--config.{name}={value}", "--workdir", uninterrupted)
    assert line.startswith(f"error: config.{name} is {value}, but the run in {uninterrupted} was started with {old}")


def test_a_checkpoint_of_other_shapes_lists_the_first_few(arguments, uninterrupted, tmp_path):
    wider = tmp_path / "wider.py"
    wider.write_text(Path(TINY).read_text().replace('"width": 8', '"width": 16'))
    config = str(wider) + VARIANT
    line = command.refused_here(*arguments, "--workdir", uninterrupted, config=config)
    assert "is of another model or other settings" in line
    assert "norm1.mean is float32[128] there and float32[256] here; " in line
    assert re.search(r"; and \d+ more; use the settings it was made with", line), line
    init_from = f"--config.init_from={uninterrupted}"
    line = command.refused_here(*arguments, "--workdir", tmp_path / "new", init_from, config=config)
    assert "does not fit model evmamba_t for digits: head.kernel: (64, 10), expected (128, 10)" in line


def test_what_the_work_folder_holds(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    files = {"config.json", "metrics.jsonl", "speed.jsonl", "curves.png", "predictions.png", "report.html"}
    assert names == files | {"checkpoints", "tensorboard"}
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["duration"]["steps"] == STEPS
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(5, STEPS + 1, 5))
    assert [row["step"] for row in rows if "top1" in row] == list(range(20, STEPS + 1, 20))
    assert all(row["examples"] == 360 for row in rows if "top1" in row)
    speed = [json.loads(line) for line in (uninterrupted / "speed.jsonl").read_text().splitlines()]
    assert any("compile_seconds" in row for row in speed)
    assert any(row.get("images_per_second", 0) > 0 and 0 <= row["input_wait"] <= 1 for row in speed)
    # the last two, and the best besides
    steps = steps_on_disk(uninterrupted)
    assert steps[-2:] == [STEPS - 10, STEPS]
    with Checkpoints(uninterrupted / "checkpoints") as checkpoints:
        best = max((row for row in rows if "top1" in row), key=lambda row: max(row["top1"], row["ema_top1"]))
        assert checkpoints.best_step() == best["step"]
        assert best["step"] in steps


def test_evaluation_only_repeats_the_last_figures(arguments, uninterrupted, tmp_path):
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    figures = [row for row in rows if "top1" in row][-1]
    shutil.copytree(uninterrupted, tmp_path / "run")
    for workdir, init_from in ((tmp_path / "run", ""), (tmp_path / "other", uninterrupted)):
        more = ("--workdir", workdir, f"--config.init_from={init_from}")
        code, out, err = run_here("--config.eval_only=True", *arguments, *more)
        assert code == 0, err
        assert f"top-1 {figures['top1']:.2f} %" in out
        assert f"moving average top-1 {figures['ema_top1']:.2f} %" in out
        assert f"(360 images); see {workdir}/per_class.csv" in out
        classes = csv.DictReader((workdir / "per_class.csv").read_text().splitlines())
        assert sum(int(row["images"]) for row in classes) == 360


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it(arguments, tmp_path):
    workdir = tmp_path / "run"
    wild = ("--config.optim.warmup.steps=1", "--config.optim.clip_norm=0", "--config.optim.lr=1e30")
    words = refused_here(*arguments, *wild, "--workdir", workdir).split()
    assert words[1] in ("loss", "grad_norm")
    assert words[3] in ("nan", "inf")
    step = int(words[words.index("step") + 1].rstrip(";"))
    assert steps_on_disk(workdir)[-1] == step - 1
    params, stats, meta = load_model(workdir)
    assert meta["step"] == step - 1
    assert all(np.isfinite(value).all() for value in {**params, **stats}.values())
