"""Signals end a run soon, wherever it is, and what it was doing is done again by the next start."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import command
import pytest
from command import TINY, on_devices
from tiny import get_config

from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.data.sources import prepare
from evmamba_jax.errors import UserError
from evmamba_jax.storage import owned
from evmamba_jax.training import loop, run, start
from evmamba_jax.training.evaluator import Evaluator
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.stopping import Stopped, Stopping

VARIANT = ":convolutions"
run_here, refused_here = (
    functools.partial(function, config=TINY + VARIANT) for function in (command.run_here, command.refused_here)
)


# What minds a signal


def test_work_that_does_not_end_is_left_behind():
    never = threading.Event()
    with Stopping() as stopping:
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with pytest.raises(Stopped) as caught:
            stopping.minding(never.wait)
        assert caught.value.signal == signal.SIGTERM
        assert stopping.received() == signal.SIGTERM
        never.set()
        for thread in stopping._behind:
            thread.join()


def test_work_that_looks_ends_by_itself_and_what_it_returns_or_raises_comes_through():
    def looking(stopping):
        while True:
            stopping.check()
            time.sleep(0.001)

    with Stopping() as stopping:
        assert stopping.minding(lambda: 3) == 3
        with pytest.raises(UserError, match="its own"):
            stopping.minding(functools.partial(raised, UserError("its own")))
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(Stopped):
            stopping.minding(functools.partial(looking, stopping))
        assert stopping._behind == []


def raised(error):
    raise error


def test_where_nothing_is_half_done_a_signal_ends_it_at_once():
    with Stopping() as stopping:
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with pytest.raises(Stopped), stopping.at_once():
            threading.Event().wait(30)
        with pytest.raises(Stopped), stopping.at_once():  # nor is anything begun
            pytest.fail("it was begun")


def test_a_second_interruption_interrupts(capfd):
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "SIGINT: saving after this step; Ctrl-C leaves at once" in capfd.readouterr().err


def test_the_handlers_before_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stopping():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_process_leaves_although_a_thread_hangs():
    """One that the interpreter joins at its end, as those of thread pools."""
    script = """
import signal, sys, threading
from evmamba_jax.training.stopping import Stopping
with Stopping() as stopping:
    threading.Thread(target=threading.Event().wait).start()
    signal.raise_signal(signal.SIGTERM)
sys.exit(128 + stopping.received())
"""
    root = command.ROOT
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=command.environment(), timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM


# Whole runs


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    lengths = {"duration": 12, "save_every": 4, "eval_every": 8, "optim.warmup": 2}
    return (*(f"--config.{name}.steps={n}" for name, n in lengths.items()), f"--config.data.data_dir={folder}")


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run_here(*arguments, "--workdir", workdir)
    assert code == 0, out + err
    return workdir


def stopped_here(*arguments):
    """Run the command in this process, which a signal ends; return its exit code and what it printed."""
    with pytest.raises(SystemExit) as caught:
        run_here(*arguments)
    return caught.value.code


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs in the main thread


def test_an_evaluation_that_a_signal_ends_is_done_again(arguments, whole, tmp_path, monkeypatch):
    class Slow(Evaluator):
        def _batches(self):
            send(signal.SIGTERM)
            return super()._batches()

    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(start, "Evaluator", Slow)
        assert stopped_here(*arguments, "--workdir", workdir) == 128 + signal.SIGTERM
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "8"]
    assert '"top1"' not in (workdir / "metrics.jsonl").read_text()
    code, out, err = run_here(*arguments, "--workdir", workdir)
    assert code == 0, out + err
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("moment", ["compiling", "waiting"])
def test_a_signal_while_compiling_or_waiting_for_data(arguments, whole, tmp_path, monkeypatch, moment):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        if moment == "compiling":
            patched.setattr(loop, "_compile", lambda *_: (send(signal.SIGTERM), time.sleep(1)))
        else:
            patched.setattr(Setup, "batches", functools.partialmethod(hanging, Setup.batches))
        assert stopped_here(*arguments, "--workdir", workdir) == 128 + signal.SIGTERM
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.steps() == ([] if moment == "compiling" else [4, 6])
    code, out, err = run_here(*arguments, "--workdir", workdir)
    assert code == 0, out + err
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def hanging(setup, batches_of, source, start):
    """Return the batches of six steps, after which nothing comes but a signal."""
    real = batches_of(setup, source, start)

    class Six:
        count = 0

        def __next__(self):
            if self.count == 6:
                threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
                threading.Event().wait(30)
            self.count += 1
            return next(real)

        def close(self):
            real.close()

    return Six()


def test_no_picture_ends_a_run_and_the_state_is_on_disk_before(arguments, whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def failing(folder, *_):
        assert (folder / "checkpoints" / "12").is_dir()
        raise RuntimeError("no ink\nat all")

    monkeypatch.setattr(loop, "curves", failing)
    monkeypatch.setattr("evmamba_jax.tasks.classification.predictions", failing)
    code, out, err = run_here(*arguments, "--workdir", workdir, pictures=True)
    assert code == 0, out + err
    assert err == "the last evaluation is not drawn: no ink at all\ncurves.png is not drawn: no ink at all\n"
    assert "Not drawn." in (workdir / "report.html").read_text()
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_in_another_thread(arguments, whole, tmp_path):
    config = get_config("convolutions")
    for name, steps in (("duration", 12), ("save_every", 4), ("eval_every", 8)):
        getattr(config, name).steps = steps
    config.optim.warmup.steps = 2
    config.data.data_dir = arguments[-1].partition("=")[2]
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run(config, tmp_path / "run")))
    with on_devices(1):
        thread.start()
        thread.join()
    assert len(ended) == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_work_folder_whose_run_is_alive_is_left_alone(arguments, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    with owned(whole):
        line = refused_here(*arguments, "--workdir", whole)
        assert f"the run in {whole} is still alive (process {os.getpid()} on " in line
        assert (whole / "metrics.jsonl").read_bytes() == before
        code, out, err = run_here(*arguments, "--workdir", whole, "--config.eval_only=True")  # which only reads
        assert code == 0, out + err


def test_a_run_shorter_than_it_is_ends_in_a_sentence(arguments, whole):
    line = refused_here(*arguments, "--workdir", whole, "--config.duration.steps=3")
    assert f"config.duration is 3 steps, but the run in {whole} has made 12" in line


def test_a_bucket_is_no_work_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("gs://bucket/run", "s3://bucket/run"):
        assert "is not on a disk of this machine" in refused_here(*arguments, f"--workdir={place}")
    assert list(tmp_path.iterdir()) == []
