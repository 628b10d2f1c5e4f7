"""Signals that ask a run to stop, and where it minds them."""

import atexit
import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")

_LOOK = 0.1  # seconds from one look at the signals to the next, while a thread works
_PATIENCE = 2.0  # seconds that a thread has to end by itself once a signal is there


class Stopped(BaseException):
    """A signal ended what was being done; no library takes it for a fault of its own.

    Attributes:
        signal: which.
    """

    def __init__(self, signal: signal.Signals):
        super().__init__(signal.name)
        self.signal = signal


class Stopping(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT, so that a run can save and leave; a second SIGINT interrupts at once.

    Python runs a handler in the main thread, and only between two instructions of Python: not before a compiler, which
    may take minutes, comes back. What may take long is therefore done by another thread, for which the main thread
    waits (``minding``); where nothing is half done the handler itself ends the waiting (``at_once``).

    A run in another thread than the main one leaves the signals to the main thread, and one of several processes leaves
    them to jax.distributed, which lets all agree on the same moment.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._at_once = False
        self._looks = 0
        self._behind: list[threading.Thread] = []

    def __enter__(self) -> "Stopping":
        mine = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if mine else ()
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._received:
            code = 128 + self._received
            atexit.register(_leave_without, self._behind, code)
            threading.Thread(target=_leave_after_the_main_thread, args=(code,), daemon=True).start()

    def _note(self, number: int, frame) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        if self._at_once:
            raise Stopped(self._received)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"{self._received.name}: saving after this step; Ctrl-C leaves at once\n".encode())

    def received(self) -> signal.Signals | None:
        """Return the signal that asks to stop, the same on every process, which all ask equally often."""
        self._looks += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._looks):
            self._received = signal.SIGTERM
        return self._received

    def check(self) -> None:
        """Raise ``Stopped`` where a signal asks to stop; see ``received``."""
        if received := self.received():
            raise Stopped(received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end what is done here with ``Stopped``, wherever that is."""
        self._at_once = True
        try:
            if self._previous and self._received:
                raise Stopped(self._received)
            yield
        finally:
            self._at_once = False

    def minding(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; where a signal comes and ``work`` does not end by itself, leave it behind.

        Raises:
            Stopped: a signal ended it; also what ``work`` raises.
        """
        if not self._previous:
            return work()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while not concurrent.futures.wait([future], _LOOK).done:
                if self._received and not concurrent.futures.wait([future], _PATIENCE).done:
                    raise Stopped(self._received)
        finally:
            if not future.done():
                self._behind.append(thread)
        return future.result()


def _leave_without(threads: list[threading.Thread], code: int) -> None:
    """End the process where one of some threads still works: the interpreter could not take it down in peace."""
    if any(thread.is_alive() for thread in threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_after_the_main_thread(code: int) -> None:
    """Do so some seconds after the main thread's end where the interpreter waits for a thread that hangs."""
    main = threading.main_thread()
    main.join()
    time.sleep(_PATIENCE)
    _leave_without([thread for thread in threading.enumerate() if thread is not main and not thread.daemon], code)
