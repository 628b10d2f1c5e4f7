"""Those who read for the loader, threads or worker processes: what they have in hand, how processes begin and end."""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.sources import Split

PATIENCE = 60.0  # seconds of waiting for data after which a line says who is waited for

_index = 0  # of this process among the workers

_DAMAGED = "a damaged file can do this to a decoder: look at these records"
_BY_SIGNAL = {
    "SIGKILL": "the system does this to who takes too much memory: lower data.num_workers or data.num_threads",
    "SIGBUS": "its shared memory is probably full: enlarge /dev/shm, or lower data.num_workers",
    "SIGSEGV": _DAMAGED,
    "SIGABRT": _DAMAGED,
}
# Windows has fewer signals.
_HINTS = {-getattr(signal, name): hint for name, hint in _BY_SIGNAL.items() if hasattr(signal, name)}


class Ledger:
    """Which record each reading thread has in hand, kept in a file: it can be told after their process has died.

    Attributes:
        workers: worker processes; 0: threads of this process read.
        threads: reading threads a process.
    """

    def __init__(self, config: DataConfig, source: Split):
        self.workers = config.num_workers
        self.threads = config.num_threads or min(16, math.ceil((os.cpu_count() or 1) / max(1, config.num_workers)))
        self._records = f"{source.name}, split {source.split}"
        file, path = tempfile.mkstemp(prefix="evmamba-reading-")
        os.truncate(file, 8 * max(1, self.workers) * (1 + self.threads))
        os.close(file)
        weakref.finalize(self, os.unlink, path)
        self._open(path)

    def _open(self, path: str) -> None:
        # A line a process: its id, then for each thread the number of the record in hand plus 1, or 0.
        self._table = np.memmap(path, np.int64, "r+", shape=(max(1, self.workers), 1 + self.threads))
        self._counter, self._thread = itertools.count(), threading.local()
        self._waits_since: float | None = None
        self._watching, self._closed = False, threading.Event()

    def __getstate__(self):
        return self.workers, self.threads, self._records, self._table.filename

    def __setstate__(self, state):
        self.workers, self.threads, self._records, path = state
        self._open(path)

    def sign_in(self) -> None:
        """Note the id of this worker process."""
        self._table[_index, 0] = os.getpid()

    @contextlib.contextmanager
    def in_hand(self, record: int) -> Iterator[None]:
        """Note that this thread reads a record."""
        if not hasattr(self._thread, "place"):
            self._thread.place = 1 + next(self._counter) % self.threads
        self._table[_index, self._thread.place] = record + 1
        try:
            yield
        finally:
            self._table[_index, self._thread.place] = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that this process waits for the readers: where that takes long, a line says who has what in hand."""
        if not self._watching:
            self._watching = True
            threading.Thread(target=_watch, args=(weakref.ref(self), self._closed), daemon=True).start()
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def waits(self) -> float:
        """Return for how many seconds this process has been waiting."""
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def readers(self) -> str:
        """Say who has what in hand."""
        held = {index: self._held(index) for index in range(len(self._table)) if self._held(index)}
        if not held:
            return f"nobody reads from {self._records}"
        if not self.workers:
            return f"still reading {held[0]}"
        return "still reading: " + "; ".join(f"worker process {self._named(i)}, {what}" for i, what in held.items())

    def obituary(self, code: int) -> str:
        """Say which worker process has ended, with an exit code as ``multiprocessing`` gives it, and over what."""
        dead = [index for index in range(self.workers) if self._table[index, 0] and not self._lives(index)]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        who, over = "a worker process", "before it had begun to read"
        if dead:
            who = f"worker process {self._named(dead[0])}"
            over = f"while it read {self._held(dead[0])}" if self._held(dead[0]) else f"between two of {self._records}"
        return f"{who} {how} {over}; {_HINTS.get(code, 'what it printed stands above')}"

    def _held(self, index: int) -> str:
        numbers = ", ".join(str(number - 1) for number in sorted(self._table[index, 1:]) if number)
        return numbers and f"record {numbers} of {self._records}"

    def _named(self, index: int) -> str:
        return f"{index + 1} of {self.workers} (pid {self._table[index, 0]})"

    def _lives(self, index: int) -> bool:
        try:
            os.kill(int(self._table[index, 0]), 0)
        except ProcessLookupError:
            return False
        return True

    def kill_workers(self) -> None:
        """End the worker processes at once."""
        for pid in self._table[:, 0].tolist():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM)) if pid else None


def _watch(reference: weakref.ref[Ledger], closed: threading.Event) -> None:
    told = False
    while not closed.wait(PATIENCE / 10) and (ledger := reference()):
        late = ledger.waits() > PATIENCE
        if late and not told:
            print(f"no data for {PATIENCE:.0f} s; {ledger.readers()}", file=sys.stderr, flush=True)
        told = late
        del ledger  # else it could not go while this thread sleeps


def begin(ledger: Ledger, index: int, count: int) -> None:
    """Prepare this process, which has just started as one of the workers."""
    del count
    global _index
    _index = index
    # It imports the main module, and with it JAX: it must not take the main process's devices.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # already imported, and then the variable has been read
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Ctrl-C and the signals of schedulers reach all processes at once: the main one says when its workers end ...
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # ... and where it was killed it cannot.
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    ledger.sign_in()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
