"""What becomes of the readers: workers that die or hang are named, all end with the main process, nothing piles up."""

import dataclasses
import gc
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from evmamba_jax.data import workers
from evmamba_jax.data.loader import eval_batches, train_batches
from evmamba_jax.errors import UserError

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
PROCESS = Path("/proc")


@dataclasses.dataclass
class Records:
    """Records that note every reading in a file, and do something in a worker process when one of them is read."""

    records: list[bytes]
    log: Path
    fateful: int = -1
    fate: int | None = None  # a signal; None: to hang

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        with self.log.open("ab") as log:
            log.write(b".")
        if index == self.fateful and multiprocessing.parent_process():
            if self.fate:
                os.kill(os.getpid(), self.fate)
            time.sleep(1000)
        return self.records[index]


@pytest.fixture
def watched(numbered, tmp_path):
    """Makes a source of n numbered images whose readings are counted."""

    def make(n, **fate):
        source = numbered(n)
        log = tmp_path / "log"
        log.touch()
        return dataclasses.replace(source, records=Records(source.records, log, **fate)), lambda: log.stat().st_size

    return make


def ended(pid):
    """Whether a process is gone, or a zombie for which only its parent could care."""
    stat = PROCESS / str(pid) / "stat"
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(true, seconds=60.0):
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.05)


def stays(count):
    """Return a count once it has not changed for a while."""
    last = -1
    while last != count():
        last = count()
        time.sleep(0.7)
    return last


@pytest.mark.parametrize(
    ("fate", "hint"),
    [(signal.SIGSEGV, "a damaged file"), (signal.SIGKILL, "too much memory")],
)
def test_a_worker_that_dies_is_named_with_its_record(watched, small, fate, hint):
    source, _ = watched(10, fateful=7, fate=fate)
    config = dataclasses.replace(small, num_threads=1, num_workers=1)
    with eval_batches(config, source, global_batch=2) as batches, pytest.raises(UserError) as caught:
        list(batches)
    said = re.sub(r"pid \d+", "pid N", str(caught.value))
    cause = f"was killed by {fate.name} while it read record 7 of numbers, split all; "
    assert said.startswith("worker process 1 of 1 (pid N) " + cause)
    assert hint in said
    assert "\n" not in said


def test_reading_threads_that_hang_are_named(numbered, small, monkeypatch, capsys):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    go_on = threading.Event()

    class Slow(list):
        def __getitem__(self, index):
            if index == 3:
                go_on.wait(60)
            return super().__getitem__(index)

    source = numbered(4)
    source = dataclasses.replace(source, records=Slow(source.records))
    with eval_batches(dataclasses.replace(small, num_threads=1), source, global_batch=4) as batches:
        threading.Timer(1.0, go_on.set).start()
        next(batches)
    assert capsys.readouterr().err == "no data for 0 s; still reading record 3 of numbers, split all\n"


MAIN = """
import multiprocessing, os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from conftest import example
from test_workers import Records
from evmamba_jax.data import loader, workers
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.loader import eval_batches, train_batches
from evmamba_jax.data.sources import Source

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down that it is ignored

if __name__ == "__main__":
    png = bytes.fromhex({png!r})
    records = Records([example(png, 0)] * 10, Path(__file__).with_name("log"), fateful={fateful})
    source = Source(name="numbers", split="all", class_names=("0",), records=records)
    config = DataConfig(image_size=8, in_channels=1, mean=(0.5,), std=(0.5,), num_threads=1, num_workers=1)
"""


@pytest.fixture
def main_process(tmp_path):
    """Starts a process of its own with what MAIN defines, and more."""
    buffer, started = io.BytesIO(), []
    Image.new("L", (8, 8)).save(buffer, "PNG")

    def start(more, fateful=-1, **pipes):
        script = tmp_path / "main.py"
        before = MAIN.format(here=str(Path(__file__).parent), png=buffer.getvalue().hex(), fateful=fateful)
        script.write_text(before + textwrap.indent(textwrap.dedent(more), "    "))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        started.append(subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@linux
def test_a_worker_that_hangs_is_named_and_does_not_hold_up_the_end(main_process):
    """As a user has it: no more data, a line that says why, and Ctrl-C. The patience is shortened."""
    more = """
        workers.PATIENCE = loader._GOODBYE = 1.0
        with eval_batches(config, source, global_batch=2) as batches:
            for _ in range(3):
                next(batches)
            (worker,) = multiprocessing.active_children()
            print(worker.pid, flush=True)
            list(batches)
    """
    main = main_process(more, fateful=7, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = int(main.stdout.readline())
    who = f"worker process 1 of 1 (pid {pid}), record 7 of numbers, split all"
    # A slow start of the worker is told too, before.
    assert any(line == f"no data for 1 s; still reading: {who}\n" for line in main.stderr)
    main.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in main.communicate(timeout=120)[1]
    assert main.returncode == -signal.SIGINT
    wait_until(lambda: ended(pid))


@linux
def test_signals_leave_workers_alone_but_they_end_with_the_main_process(main_process):
    more = """
        batches = train_batches(config, source, seed=0, global_batch=2)
        next(batches)
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        for _ in range(30):
            next(batches)
        print(worker.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    main = main_process(more, stdout=subprocess.PIPE)
    pid = int(main.communicate(timeout=120)[0])
    assert main.returncode == -signal.SIGKILL
    wait_until(lambda: ended(pid))


@pytest.mark.parametrize(("processes", "threads", "global_batch"), [(0, 2, 96), (0, 3, 8), (2, 1, 96)])
def test_reads_no_further_ahead_than_promised(watched, small, processes, threads, global_batch):
    """One batch and a part, at most 32 rows, for each thread; worker processes hold four parts more each."""
    source, count = watched(10)
    config = dataclasses.replace(small, num_threads=threads, num_workers=processes)
    part = min(global_batch, 32)
    parts_a_process = -(-global_batch // part // max(1, processes)) + threads + (4 if processes else 0)
    with train_batches(config, source, seed=0, global_batch=global_batch) as batches:
        for _ in range(3):
            next(batches)
        assert stays(count) <= 3 * global_batch + part * max(1, processes) * parts_a_process


@pytest.fixture
def many(numbered):
    """A source of 4000 records; Grain takes milliseconds to shuffle an index among ten."""
    source = numbered(40)
    return dataclasses.replace(source, records=source.records * 100)


def held(pid):
    """What a process holds: open files, threads, mapped shared memory, MiB."""
    folder = PROCESS / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {
        "files": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "shared": (folder / "maps").read_text().count("/dev/shm/psm_"),
        "MiB": int(status["VmRSS"].split()[0]) / 1024,
    }


def held_here():
    gc.collect()
    return held("self") | {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks()}


def assert_no_more(after, before, batches):
    """A leak of one thing a batch would exceed what comes and goes by far."""
    allowed = {"files": 80, "threads": 4, "shared": 80, "MiB": 24, "objects": batches // 5, "blocks": batches // 2}
    for name, value in after.items():
        assert value <= before[name] + allowed[name], (name, before, after)


@linux
def test_four_thousand_batches_leave_nothing_behind(many, small):
    config = dataclasses.replace(small, image_size=96)  # two of them a batch: 74 MB if all were kept
    with train_batches(config, many, seed=0, global_batch=2) as batches:
        for _ in range(300):
            next(batches)
        before = held_here()
        for _ in range(4000):
            next(batches)
        assert_no_more(held_here(), before, 4000)


@linux
def test_a_thousand_batches_of_workers_leave_nothing_behind(many, small):
    config = dataclasses.replace(small, image_size=64, num_threads=1, num_workers=1)
    with train_batches(config, many, seed=0, global_batch=2) as batches:
        for _ in range(100):
            next(batches)
        (worker,) = multiprocessing.active_children()
        before, before_there = held_here(), held(worker.pid)
        for _ in range(1000):
            next(batches)
        assert_no_more(held_here(), before, 1000)
        assert_no_more(held(worker.pid), before_there, 1000)
        maps = (PROCESS / str(worker.pid) / "maps").read_text() + (PROCESS / "self" / "maps").read_text()
        segments = {word for word in maps.split() if word.startswith("/dev/shm/psm_")}
    assert segments
    gc.collect()
    wait_until(lambda: not any(Path(segment).exists() for segment in segments))
