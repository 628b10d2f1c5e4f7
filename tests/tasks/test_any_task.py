"""The loop, checkpoints and preflight with a task that they have never heard of: digit_mask.py."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.data.sources import prepare
from evmamba_jax.tasks import task_of
from evmamba_jax.training import parse_command, run
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "tasks" / "digit_mask.py")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return folder


def arguments(data_dir, workdir, *more):
    settings = ["--config.mesh.fsdp=2", "--config.accumulation=2", f"--config.data.data_dir={data_dir}"]
    return ["train_tpu.py", "--config", CONFIG, "--workdir", str(workdir), *settings, *more]


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """Return the work folder of a run that nothing stopped, and what it told."""
    workdir = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        run(*parse_command(arguments(data_dir, workdir)))
    return workdir, told.getvalue()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_and_reports(whole):
    workdir, told = whole
    training = [row for row in rows(workdir) if "loss" in row]
    evaluations = [row for row in rows(workdir) if "error" in row]
    names = {"step", "epoch", "loss", "lr", "grad_norm", "mask_loss", "share_loss"}
    assert [set(row) for row in training] == [names] * 6
    for row in training:
        assert row["loss"] == pytest.approx(row["mask_loss"] + row["share_loss"], rel=1e-5)
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    assert [row["step"] for row in evaluations] == [8, 16, 24]
    assert evaluations[-1]["error"] < 0.8 * evaluations[0]["ema_error"]
    assert evaluations[-1]["examples"] == 360
    assert f"step 24: {evaluations[-1]['error']:.2f} % of the pixels wrong; see {workdir}" in told
    assert float((workdir / "worst.txt").read_text()) == evaluations[-1]["ema_worst_overlap"] > 0
    assert (workdir / "curves.png").is_file()


def test_its_own_figure_chooses_the_best_checkpoint(whole):
    workdir, _ = whole
    errors = {row["step"]: min(row["error"], row["ema_error"]) for row in rows(workdir) if "error" in row}
    with Checkpoints(workdir / "checkpoints", best_metric="error", higher=False) as checkpoints:
        assert checkpoints.best_step() == min(errors, key=errors.__getitem__)
        meta = checkpoints.restore_meta()
    assert meta["chooses"] == {"figure": "error", "higher": False}
    assert meta["config"]["task"] == "digit_mask"


class Killed(Exception):
    pass


def test_killed_and_started_again_it_is_the_same_to_the_bit(data_dir, whole, tmp_path, monkeypatch):
    """As in test_resume.py, with the process's end played by an exception, after a save and in the midst of one."""
    save = Checkpoints.save

    def run_until(step, *, before):
        def killing_save(self, at, *args, **options):
            if at == step and before:
                raise Killed
            save(self, at, *args, **options)
            if at == step:
                raise Killed

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(Checkpoints, "save", killing_save)
            run(*parse_command(arguments(data_dir, tmp_path)))
            pytest.fail("it was not killed")

    run_until(8, before=True)
    run_until(12, before=False)
    run(*parse_command(arguments(data_dir, tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()
    one, other = (final_state(data_dir, workdir) for workdir in (tmp_path, whole[0]))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert int(one.step) == 24
    marks, kernel = one.extra["marks"]["first.kernel"], one.model.params["first.kernel"]
    assert (marks != (kernel > 0)).any()  # kept from the first step, as the task put them there


def final_state(data_dir, workdir):
    config, _ = parse_command(arguments(data_dir, workdir))
    task = task_of(config)(config, [str(k) for k in range(10)])
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        _, items, _ = checkpoints.restore(Setup(task, make_mesh(config), 1437).abstract_state.items())
    return jax.device_get(TrainState.of_items(items))


def test_it_is_evaluated_alone(data_dir, whole, tmp_path, capsys):
    more = ("--config.eval_only=True", f"--config.init_from={whole[0]}")
    figures = run(*parse_command(arguments(data_dir, tmp_path, *more)))
    last = rows(whole[0])[-1]
    assert figures == {name: last[name] for name in figures}
    assert f"see {tmp_path / 'wrong.txt'}" in capsys.readouterr().out


def test_its_own_settings_are_set_on_the_command_line(data_dir, tmp_path):
    config, _ = parse_command(arguments(data_dir, tmp_path, "--config.threshold=30"))
    assert (config.threshold, config.mesh.fsdp) == (30, 2)


def test_the_command_trains_and_preflights_it(data_dir, tmp_path):
    """The two commands, each as its user starts it; the exact step through the TPU's compiler."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "PYTEST"))}
    command = [sys.executable, *arguments(data_dir, tmp_path / "run", "--config.duration.steps=4")]
    command[-1:] += ["--config.mesh.fsdp=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pixels wrong; see" in done.stdout
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, "-m", "evmamba_jax.preflight", *arguments(data_dir, tmp_path)[1:3]]
    command += ["--config.mesh.fsdp=2", "--topology", "v5e-8", "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPILES AND FITS: " in done.stdout
    assert "  other" in done.stdout  # the marks
