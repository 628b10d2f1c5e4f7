"""What a run tells: a progress bar or plain lines, metrics.jsonl, speed.jsonl and TensorBoard events.

``metrics.jsonl`` holds only what a resumed run reproduces to the bit, so it can be compared with ``diff``. Everything
that depends on the clock goes to ``speed.jsonl``.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.summary import scalar
from tqdm import tqdm

from evmamba_jax.storage import storage_errors

METRICS = "metrics.jsonl"
SPEED = "speed.jsonl"


class Part(NamedTuple):
    """A run that is one of several.

    Attributes:
        name: said on each line.
        before: steps of those before it, as its own count them.
        after: steps of those after it.
    """

    name: str
    before: int
    after: int


class Reporter:
    """Writes a run's figures to its work folder and shows them; in processes other than the main one, does nothing.

    Each line is one JSON object of numbers: ``step`` (updates made), ``epoch`` and the figures given, under their own
    names. Floats are written so that reading gives back the same bits. A line is with the operating system when the
    call that wrote it returns; ``flush`` brings it to the disk.

    Args:
        workdir: the work folder; made if missing.
        total_steps: updates in the whole run.
        steps_per_epoch: updates in an epoch.
        is_main: whether this process reports.
        part: of a longer work, whose time left is told.

    Raises:
        UserError: the folder is full or not writable; any method may find out.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        steps_per_epoch: float,
        is_main: bool,
        part: Part | None = None,
    ):
        self.part = part or Part("", 0, 0)
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.is_main = is_main
        if not is_main:
            return
        self._folder = Path(workdir)
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._metrics = _Lines(self._folder / METRICS)
            self._speed = _Lines(self._folder / SPEED)
        self._events: EventsWriter | None = None
        self._start = self._step = 0
        self._first: tuple[int, float] | None = None  # step and time of the first log, from which to tell the time left
        self._bar = None
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:  # some report a width of 0
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            total = self.part.before + total_steps + self.part.after
            self._bar = tqdm(total=total, desc=self.part.name, bar_format=layout, dynamic_ncols=True, leave=False)

    def rewind(self, step: int) -> None:
        """Forget the metrics after ``step``, for a run that continues from there; call it before anything is logged.

        An evaluation of ``step`` itself that is logged again is not repeated in the file.

        Args:
            step: the step of the checkpoint that was restored, 0 for none.
        """
        if not self.is_main:
            return
        self._start = self._step = step
        with storage_errors(self._folder):
            self._metrics.keep(lambda row: row["step"] <= step)
        if self._bar is not None:
            self._bar.n = self.part.before + step
            self._bar.refresh()

    def log_train(self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Record and show how training goes.

        Args:
            step: updates made.
            metrics: reproducible figures; ``loss`` and ``lr`` are shown.
            speed: figures that depend on the clock; ``images_per_second`` and ``input_wait``, the share of the
                time spent waiting for a batch, are shown.
        """
        if not self.is_main:
            return
        self._step = step
        self._write(self._metrics, "train", metrics, epoch=step / self.steps_per_epoch)
        self.log_speed(speed)

        shown = {"epoch": f"{step / self.steps_per_epoch:.4g}"}
        if "loss" in metrics:
            shown["loss"] = f"{metrics['loss']:.4f}"
        if "lr" in metrics:
            shown["lr"] = f"{metrics['lr']:.2e}"
        text = " ".join(f"{name} {value}" for name, value in shown.items())
        if "images_per_second" in speed:
            text += f" {speed['images_per_second']:.0f} images/s"
        if "input_wait" in speed:
            text += f" input wait {speed['input_wait']:.0%}"
        text += self._time_left(step)
        if self._bar is None:
            self.line(f"{self._at(step)} {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = self.part.before + step
            self._bar.refresh()

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record and show an evaluation.

        Args:
            step: updates made before it.
            metrics: reproducible figures; ``curves`` draws ``top1`` and ``ema_top1`` (per cent).
        """
        if not self.is_main:
            return
        self._step = step
        self._write(self._metrics, "eval", metrics, epoch=step / self.steps_per_epoch)
        figures = " ".join(f"{name} {round(value, 4):.7g}" for name, value in metrics.items())
        self.line(f"{self._at(step)} epoch {step / self.steps_per_epoch:.4g} evaluation: {figures}")

    def log_speed(self, speed: Mapping[str, float]) -> None:
        """Record figures that depend on the clock, such as seconds of compilation, under the last step logged."""
        if self.is_main:
            self._write(self._speed, "speed", speed)

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.is_main:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def summary(self, text: str) -> None:
        """Take the bar away and print the run's last line."""
        if not self.is_main:
            return
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.line(text)

    def flush(self) -> None:
        """Bring everything to the disk; before a checkpoint is saved, so that no line it stands for can be missing."""
        if self.is_main:
            with storage_errors(self._folder):
                self._metrics.sync()
                self._speed.sync()
                if self._events is not None:
                    self._events.flush()

    def close(self) -> None:
        """Flush, close the files and take the bar away."""
        if not self.is_main:
            return
        if self._bar is not None:
            self._bar.close()
        with storage_errors(self._folder):
            self._metrics.close()
            self._speed.close()
            if self._events is not None:
                self._events.close()

    def _write(self, lines: "_Lines", group: str, figures: Mapping[str, float], **position: float) -> None:
        figures = {name: float(value) for name, value in figures.items()}
        with storage_errors(self._folder):
            lines.add({"step": self._step, **position, **figures})
            if self._events is None:
                self._events = _open_events(self._folder / "tensorboard", first_step=self._start + 1)
            for name, value in figures.items():
                event = Event(step=self._step, wall_time=time.time(), summary=scalar(f"{group}/{name}", value))
                self._events.write_event(event)

    def _at(self, step: int) -> str:
        return f"{self.part.name} step {step}/{self.total_steps}".lstrip()

    def _time_left(self, step: int) -> str:
        """Estimate from the pace since the first log, which leaves out compilation but counts evaluations and saves."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        steps_done, seconds = step - self._first[0], now - self._first[1]
        if steps_done <= 0:
            return ""
        left = self.total_steps - step + self.part.after
        return f" left {tqdm.format_interval(seconds / steps_done * left)}"


class _Lines:
    """A file of JSON lines that survives its writer: a half-written last line is dropped when it is opened again."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self.keep(lambda row: True)

    def add(self, row: Mapping[str, float]) -> None:
        """Append a line, unless the file held the very same one when it was opened."""
        line = json.dumps(row) + "\n"
        if line not in self._found:
            self._file.write(line)
            self._file.flush()

    def keep(self, wanted: Callable[[dict[str, float]], bool]) -> None:
        """Replace the file, in one move, by its whole lines that are wanted."""
        lines = [json.dumps(row) + "\n" for row in read_rows(self._path) if wanted(row)]
        beside = self._path.with_suffix(".tmp")
        self._file.close()
        self._file = beside.open("w", encoding="utf-8")
        self._file.writelines(lines)
        self.sync()
        beside.replace(self._path)
        self._found = set(lines)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the lines of a ``metrics.jsonl`` or ``speed.jsonl`` up to a half-written one; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _open_events(folder: Path, first_step: int) -> EventsWriter:
    """Start an event file that replaces whatever earlier files of the folder hold from ``first_step`` on.

    The synchronous writer: ``tensorboardX.SummaryWriter`` hands events to a thread, which loses some in a kill and
    blocks the run for ever when the disk is full.
    """
    folder.mkdir(exist_ok=True)
    events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")  # two starts in a second differ
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=first_step, wall_time=time.time(), session_log=start))
    return events
