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
from command import TINY, environment

from evmamba_jax.checkpoints import Checkpoints, load_model

# What a run restores knows of no layer, and these tests start some thirty: the model that starts fastest will do.
# test_end_to_end.py kills and resumes one with a scan.
VARIANT = ":convolutions"
run, start = (functools.partial(function, config=TINY + VARIANT) for function in (command.run, command.start))

STEPS, KILLS = 120, 20
ARGUMENTS = (f"--config.duration.steps={STEPS}", "--config.save_every.steps=20", "--config.eval_every.steps=20")
OFTEN = "--config.save_every.steps=3"  # for lives that are short; how often a run saves changes nothing in it


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return the environment of all runs of this file, with data that they share."""
    return environment(TFDS_DATA_DIR=str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def uninterrupted(shared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run(*ARGUMENTS, "--workdir", workdir, env=shared)
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


def test_twenty_kills_at_random_moments_change_nothing(shared, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    chance = random.Random(0)
    kills, in_save = 0, 0
    while kills < KILLS:
        before = steps_on_disk(workdir)
        process = start(*ARGUMENTS, OFTEN, "--workdir", workdir, env=shared)
        # Wait until this life has got somewhere, then a random moment more: in a step, in a save, between the two.
        # Every fifth life is cut short while it starts.
        if kills % 5 == 4:
            time.sleep(chance.uniform(0.5, 4))
        else:
            deadline = time.monotonic() + 120
            while steps_on_disk(workdir) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended by itself after {kills} kills: {out}{err}"
        in_save += any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
        kills += 1
    assert in_save > 0  # some kills did fall into a save
    assert steps_on_disk(workdir)[-1] < STEPS
    code, out, err = run(*ARGUMENTS, "--workdir", workdir, env=shared)
    assert code == 0, out + err
    assert_same_run(workdir, uninterrupted)


def test_sigterm_saves_and_the_next_start_continues(shared, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(*ARGUMENTS, "--workdir", workdir, "--config.save_every.steps=1000", env=shared)
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, out + err
    (saved,) = steps_on_disk(workdir)
    assert f"SIGTERM: step {saved} is saved in {workdir}; the same command continues from there" in out
    assert "SIGTERM: saving after this step; Ctrl-C leaves at once" in err
    code, out, err = run(*ARGUMENTS, "--workdir", workdir, env=shared)
    assert code == 0, out + err
    assert_same_run(workdir, uninterrupted)


def test_a_truncated_newest_checkpoint_is_named_and_the_one_before_used(shared, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before, newest = steps_on_disk(workdir)[-2:]
    largest = max((workdir / "checkpoints" / str(newest)).rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    code, out, err = run(*ARGUMENTS, "--workdir", workdir, env=shared)
    assert code == 0, out + err
    assert f"checkpoint {newest} is damaged" in err
    assert f"continuing from {before}" in err
    assert_same_run(workdir, uninterrupted)


def test_a_finished_run_says_so_and_stays_as_it_is(shared, uninterrupted):
    kept = (uninterrupted / "metrics.jsonl").read_bytes()
    code, out, err = run(*ARGUMENTS, "--workdir", uninterrupted, env=shared)
    assert code == 0, err
    assert f"has ended at step {STEPS}" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize(("name", "value", "old"), [("batch_size", 16, 32), ("seed", 1, 0)])
def test_what_orders_the_data_cannot_change(shared, uninterrupted, name, value, old):
    code, _, err = run(*ARGUMENTS, f"--config.{name}={value}", "--workdir", uninterrupted, env=shared)
    assert code == 2
    assert err.startswith(f"error: config.{name} is {value}, but the run in {uninterrupted} was started with {old}")
    assert len(err.strip().splitlines()) == 1


def test_a_checkpoint_of_other_shapes_lists_the_first_few(shared, uninterrupted, tmp_path):
    wider = tmp_path / "wider.py"
    wider.write_text(Path(TINY).read_text().replace('"width": 8', '"width": 16'))
    code, _, err = run(*ARGUMENTS, "--workdir", uninterrupted, config=str(wider) + VARIANT, env=shared)
    assert code == 2
    assert "is of another model or other settings" in err
    assert "norm1.mean is float32[128] there and float32[256] here; " in err
    assert re.search(r"; and \d+ more; use the settings it was made with", err), err
    init_from = f"--config.init_from={uninterrupted}"
    code, _, err = run(*ARGUMENTS, "--workdir", tmp_path / "new", init_from, config=str(wider) + VARIANT, env=shared)
    assert code == 2
    assert "does not fit model evmamba_t for digits: head.kernel: (64, 10), expected (128, 10)" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = run("--workdir", tmp_path / "nothing", "--config.eval_only=True", env=shared)
    assert code == 2
    assert f"there is no run in {tmp_path / 'nothing'} to evaluate" in err
    assert not (tmp_path / "nothing").exists()


def test_what_the_work_folder_holds(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    files = {"config.json", "metrics.jsonl", "speed.jsonl", "curves.png", "predictions.png"}
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
    assert steps[-2:] == [STEPS - 20, STEPS]
    with Checkpoints(uninterrupted / "checkpoints") as checkpoints:
        best = max((row for row in rows if "top1" in row), key=lambda row: max(row["top1"], row["ema_top1"]))
        assert checkpoints.best_step() == best["step"]
        assert best["step"] in steps


def test_evaluation_only_repeats_the_last_figures(shared, uninterrupted, tmp_path):
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    figures = [row for row in rows if "top1" in row][-1]
    shutil.copytree(uninterrupted, tmp_path / "run")
    for arguments in (
        ("--workdir", tmp_path / "run"),
        ("--workdir", tmp_path / "other", f"--config.init_from={uninterrupted}"),
    ):
        code, out, err = run("--config.eval_only=True", *arguments, env=shared)
        assert code == 0, err
        assert f"top-1 {figures['top1']:.2f} %" in out
        assert f"moving average top-1 {figures['ema_top1']:.2f} %" in out
        assert f"(360 images); see {arguments[1]}/per_class.csv" in out
        classes = csv.DictReader((arguments[1] / "per_class.csv").read_text().splitlines())
        assert sum(int(row["images"]) for row in classes) == 360


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it(shared, tmp_path):
    workdir = tmp_path / "run"
    arguments = ("--workdir", workdir, "--config.optim.warmup.steps=1", "--config.optim.clip_norm=0")
    code, _, err = run(*ARGUMENTS, *arguments, "--config.optim.lr=1e30", env=shared)
    assert code == 2
    (line,) = [line for line in err.splitlines() if not line.startswith("preparing digits")]
    words = line.split()
    assert words[1] in ("loss", "grad_norm")
    assert words[3] in ("nan", "inf")
    step = int(words[words.index("step") + 1].rstrip(";"))
    assert steps_on_disk(workdir)[-1] == step - 1
    params, stats, meta = load_model(workdir)
    assert meta["step"] == step - 1
    assert all(np.isfinite(value).all() for value in {**params, **stats}.values())
