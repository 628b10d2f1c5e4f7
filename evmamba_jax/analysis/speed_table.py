"""Tables of speed: ``python -m evmamba_jax.analysis throughput --models NAME ...``; with peers of other libraries."""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from evmamba_jax import cli
from evmamba_jax.analysis import speed
from evmamba_jax.analysis.peers import Peers
from evmamba_jax.analysis.speed import DTYPES, ROUNDS, SECONDS, DeviceGone
from evmamba_jax.analysis.speed_plot import draw_speed
from evmamba_jax.analysis.subjects import png
from evmamba_jax.errors import UserError, one_of
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.measuring.rounds import spread, steps_for, take_turns, waited, warmed_up
from evmamba_jax.models.registry import VARIANTS, input_size

TITLE = "Throughput"
MEBIBYTE = 2**20
SETTLED = 0.2  # seconds of a step that need not be made once untimed, after another side's turn, to fill the caches

COLUMNS = (
    "model",
    ("images a step", "{}"),
    ("px", "{}"),
    "type",
    "mode",
    ("images/s", "{:,.4g}"),
    ("its quartiles", "{:,.4g} to {:,.4g}"),
    ("latency of one image, ms", "{:,.4g}"),
    ("peak memory, MiB", "{:,.0f}"),
    "told by",
    ("compile, s", "{:.1f}"),
    ("multiply-adds, G", "{:.2f}"),
    ("published top-1, %", "{:.1f}"),
    "beside",
    ("ratio", "{:.2f}"),
    ("quartiles of the ratio", "{:.2f} to {:.2f}"),
    "note",
)
NAMES = tuple(column if isinstance(column, str) else column[0] for column in COLUMNS)


# By our model the peers beside which a published table has it. VMamba: arXiv:2401.10166, table 1.
TABLES: dict[str, dict[str, Sequence[str]]] = {
    "vmamba": {
        "vmamba_t": ("timm:swin_tiny_patch4_window7_224", "timm:convnext_tiny"),
        "vmamba_s": ("timm:swin_small_patch4_window7_224", "timm:convnext_small"),
        "vmamba_b": ("timm:swin_base_patch4_window7_224", "timm:convnext_base"),
    }
}

# Published top-1 on ImageNet-1K at 224 px, trained on nothing else, per cent: arXiv:2103.14030, table 1;
# arXiv:2201.03545, table 1; arXiv:2012.12877, table 5; arXiv:2405.07992, table 1.
PEERS_TOP1 = {
    "timm:swin_tiny_patch4_window7_224": 81.3,
    "timm:swin_small_patch4_window7_224": 83.0,
    "timm:swin_base_patch4_window7_224": 83.5,
    "timm:convnext_tiny": 82.1,
    "timm:convnext_small": 83.1,
    "timm:convnext_base": 83.8,
    "timm:deit_tiny_patch16_224": 72.2,
    "timm:deit_small_patch16_224": 79.8,
    "timm:deit_base_patch16_224": 81.8,
    "timm:mambaout_femto": 78.9,
    "timm:mambaout_tiny": 82.7,
    "timm:mambaout_small": 84.1,
    "timm:mambaout_base": 84.2,
}


class Case(NamedTuple):
    """One row of ours: a model, images a step, their side in pixels, the compute type, "inference" or "training"."""

    model: str
    batch: int
    side: int
    dtype: str
    mode: str

    @property
    def words(self) -> str:
        """The case as progress shows it."""
        return f"{self.model}, {self.batch} x {self.side} px, {self.dtype}, {self.mode}"


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis throughput") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description=(
            "Images a second, latency, memory, compile time and multiply-adds of models on the device at hand; beside "
            "them models of timm or the official code, in turns. Rows are printed, and written, as they are done; the "
            "same command with the same --json goes on where it was stopped."
        ),
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="registered names, e.g. vmamba_t")
    parser.add_argument("--table", choices=TABLES, help="models and peers of a published table")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N", help="images a step (default 1 8)")
    parser.add_argument("--size", nargs="+", type=int, metavar="PX", help="sides of the images (default: the card's)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="compute types")
    parser.add_argument(
        "--mode", nargs="+", default=["inference"], choices=("inference", "training"), help="what is measured"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of a row, all rounds together (default {SECONDS:g})"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of a row, where steps are short (default {ROUNDS})"
    )
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter of an environment with torch and timm")
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="PEER", help="timm:NAME, or official:FOLDER:NAME; beside every model"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="estimate the train steps for a TPU that is not there, e.g. v5e-1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, Markdown beside it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the Markdown here")
    parser.add_argument("--plot", type=png, metavar="PNG", help="draw throughput over size, and accuracy over it")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    groups = _groups(args)
    if args.topology:
        from evmamba_jax.analysis import estimates  # late: the preflight brings all that a training needs

        estimates.check_topology(args.topology)
        report = _report(args, {"device": args.topology}, {}, estimates.KNOWN)
        _fill(report, _cases([*groups], args), functools.partial(_estimated, estimates.estimate, args.topology))
    else:
        if args.peer_python:  # on a GPU, JAX would take most of its memory at once
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        device = _device()
        peers = _open_peers(args, groups, device)
        try:
            settings = {
                "device": device.device_kind if device.platform != "cpu" else machine.processor(),
                "threads": machine.threads(),
                "versions": machine.versions("jax", "jaxlib", "flax") | (_of_peers(peers) if peers else {}),
            }
            report = _report(args, settings, {"seconds": args.seconds, "rounds": args.rounds}, _words(args, peers))
            measure = Measuring(args.seconds, args.rounds, peers, groups, _latencies(report))
            _fill(report, _cases([*groups], args), measure, groups)
        finally:
            if peers:
                peers.close()
    if args.plot:
        draw_speed(_rows(report.document), args.plot)
        print(f"drawn: {args.plot}", file=sys.stderr)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def _groups(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """Return our models, each with the peers that stand beside it."""
    table = TABLES[args.table] if args.table else {}
    if not args.models and not args.table:
        raise UserError("no model is named: give --models NAME ..., or --table")
    for name in args.models:
        one_of("model", name, VARIANTS)
    groups: dict[str, Sequence[str]] = {name: (*table.get(name, ()), *args.peers) for name in (*table, *args.models)}
    named = any(groups.values())
    if named and not args.peer_python and not args.topology:
        raise UserError(
            "peers need --peer-python, the interpreter of an environment with torch and timm; "
            "python -m venv peers && peers/bin/python -m pip install torch torchvision timm makes one"
        )
    if args.peer_python and not named:
        raise UserError("--peer-python is given, but no peer: give --peers timm:NAME ..., or --table")
    if args.topology and {*args.mode} != {"training"}:
        raise UserError("--topology estimates train steps: give --mode training")
    for option, least in (("batch", 1), ("size", 1)):
        for value in getattr(args, option) or ():
            if value < least:
                raise UserError(f"--{option} {value}: it must be at least {least}")
    if not (args.seconds > 0 and math.isfinite(args.seconds)):
        raise UserError(f"--seconds {args.seconds:g}: give a positive number")
    if args.plot and not args.plot.absolute().parent.is_dir():
        raise UserError(f"--plot {args.plot}: there is no folder {args.plot.parent}")
    if args.rounds < 3:
        raise UserError(f"--rounds {args.rounds}: give 3 or more, for quartiles")
    return groups


def _cases(models: Sequence[str], args: argparse.Namespace) -> list[Case]:
    """Return all combinations, small batches first: the latency of one image is then known to the others."""
    cases = [
        Case(model, batch, side, dtype, mode)
        for model in models
        for side, dtype, mode, batch in itertools.product(
            args.size or [input_size(model)[0]], args.dtype, args.mode, sorted(args.batch)
        )
    ]
    return list(dict.fromkeys(cases))


def _device() -> Any:
    """Return the device that is measured; raises a UserError where JAX finds none."""
    try:
        return jax.local_devices()[0]
    except RuntimeError as error:
        raise UserError(f"no device to measure: {' '.join(str(error).split())[:200]}") from error


def _open_peers(args: argparse.Namespace, groups: Mapping[str, Sequence[str]], device: Any) -> Peers | None:
    if not args.peer_python:
        return None
    kinds = {"cpu": "cpu", "gpu": "cuda"}
    kind = one_of("device for peers", device.platform, kinds)
    names = list(dict.fromkeys(name for names in groups.values() for name in names))
    return Peers(args.peer_python, names, threads=machine.threads(), device=kind)


def _of_peers(peers: Peers) -> dict[str, str]:
    return {f"peers' {name}" if name == "Python" else name: version for name, version in peers.versions.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The document


def _report(args: argparse.Namespace, found: dict[str, Any], asked: dict[str, Any], words: str) -> Report:
    """Return the report, with the rows that the same command has written before."""
    settings, started = found | asked, _started(args.json)
    if started and started.get("settings") != settings:
        theirs = started.get("settings", {})
        differing = [name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)]
        raise UserError(
            f"--json {args.json} holds rows of another measurement ({', '.join(differing)} differ): give another file"
        )
    known = {"date": machine.today(), "versions": found.get("versions", machine.versions("jax", "jaxlib", "libtpu"))}
    place = f"{found['device']}, {machine.load()}" if "threads" in found else found["device"]
    report = Report(TITLE, args.json, page=args.markdown, started=started, machine=place, **known)
    if not started:
        report.document["settings"] = settings
        report.text(words)
        report.table(*COLUMNS)
    return report


def _started(file: Path | None) -> dict[str, Any] | None:
    if file is None or not file.exists():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        known = [column["name"] for column in document["parts"][-1]["columns"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"--json {file} is there and holds no table of throughput: give another file") from error
    if known != [*NAMES]:
        raise UserError(f"--json {file} is there and holds another table: give another file")
    return document


def _rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table by the names of their columns; an empty cell is None."""
    return [_named(row) for row in document["parts"][-1]["rows"]]


def _named(row: Sequence[Any]) -> dict[str, Any]:
    return dict(itertools.zip_longest(NAMES, row))


def _case_of(row: Mapping[str, Any]) -> Case:
    """Return the case of a row of ours, or the one beside which a peer's row stands."""
    return Case(row["beside"] or row["model"], row["images a step"], row["px"], row["type"], row["mode"])


def _latencies(report: Report) -> dict[tuple, float]:
    """Return the latencies that are known already, by model, side and type."""
    rows = [row for row in _rows(report.document) if row["latency of one image, ms"] is not None]
    return {(row["model"], row["px"], row["type"]): row["latency of one image, ms"] for row in rows}


def _fill(
    report: Report,
    cases: Sequence[Case],
    measure: Callable[[Case], list[dict[str, Any]]],
    groups: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
) -> None:
    """Measure what the report does not hold yet; a case that lacks a peer's row is measured again as a whole."""
    for number, case in enumerate(cases, 1):
        told = f"{number} of {len(cases)}: {case.words}"
        own = [row for row in _rows(report.document) if _case_of(row) == case]
        if {row["model"] for row in own} >= {case.model, *groups.get(case.model, ())}:
            print(f"{told}: measured before", file=sys.stderr, flush=True)
            continue
        print(told, file=sys.stderr, flush=True)
        table = report.document["parts"][-1]
        table["rows"] = [row for row in table["rows"] if _case_of(_named(row)) != case]
        try:
            rows = measure(case)
        except DeviceGone as error:
            kept = f"; the rows so far are in {report.out}, and the same command goes on" if report.out else ""
            raise UserError(f"{case.words}: {error}{kept}") from error
        for row in rows:
            report.row(*(row.get(name) for name in NAMES))


def _words(args: argparse.Namespace, peers: Peers | None) -> str:
    turns = (
        " Peers run in a process of their own, which sleeps while ours measures, with as many threads, eager, as timm "
        "or the official code builds them, in bfloat16 by autocast; sides take turns round by round, and a ratio is "
        "our images/s over the peer's, the median of the rounds."
        if peers
        else ""
    )
    threads = "one thread" if machine.threads() == 1 else f"{machine.threads()} threads"
    return (
        f"Median of rounds of {args.seconds:g} s together ({args.rounds} where steps are short, at least 3), images "
        f"and weights on the device already, two steps to warm up; {threads}. Training: one update "
        "(forward, backward, clipping, AdamW, moving average). Latency: median of calls with one image that wait for "
        "the answer. Memory: what the device tells, or arguments, results and temporaries of the compiled program. "
        f"Multiply-adds: of one image, forward.{turns}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@contextlib.contextmanager
def _noted(notes: dict[str, str], name: str) -> Iterator[None]:
    """Note under a name why it cannot be measured, and go on; nothing goes on without the device."""
    try:
        yield
    except DeviceGone:
        raise
    except UserError as error:
        notes[name] = str(error)


class Measuring:
    """What measures a case: our program, and the peers that stand beside it.

    Args:
        seconds: of each side, all rounds together.
        rounds: how many there are where steps are short.
        peers: the other environment.
        groups: by our model the names of its peers.
        latencies: what is known already, by model, side and type; what is measured is added.
    """

    def __init__(
        self,
        seconds: float,
        rounds: int,
        peers: Peers | None,
        groups: Mapping[str, Sequence[str]],
        latencies: dict[tuple, float],
    ):
        self.seconds, self.rounds, self.peers, self.groups = seconds, rounds, peers, groups
        self.latencies = latencies

    def __call__(self, case: Case) -> list[dict[str, Any]]:
        """Return the rows of a case: ours, then the peers'."""
        names = [case.model, *(self.groups.get(case.model, ()) if self.peers else ())]
        notes: dict[str, str] = {}
        sides: dict[str, Callable[[int], float]] = {}
        seconds: dict[str, float] = {}
        facts: dict[str, Any] = {}
        for name in names:
            with _noted(notes, name):
                facts[name], sides[name] = self._open(name, case)
                seconds[name] = warmed_up(sides[name])
        times = self._turns({name: sides[name] for name in seconds}, seconds, notes)
        rows = []
        for name in names:
            row: dict[str, Any] = dict(zip(NAMES, (name, *case[1:]), strict=False))
            row["published top-1, %"] = self._top1(name)
            if name != case.model:
                row["beside"] = case.model
            if name in times and name not in notes:
                row |= self._figures(name, case, facts[name], times[name])
                if case.mode == "inference":
                    row["latency of one image, ms"] = self._latency(name, case, sides[name])
                if name != case.model and case.model in times and case.model not in notes:
                    ratios = spread(
                        [theirs / ours for ours, theirs in zip(times[case.model], times[name], strict=True)]
                    )
                    row |= {"ratio": ratios.median, "quartiles of the ratio": [ratios.low, ratios.high]}
            rows.append(row | ({"note": notes[name]} if name in notes else {}))
        if self.peers:
            self.peers.drop()
        return rows

    def _open(self, name: str, case: Case, batch: int | None = None) -> tuple[Any, Callable[[int], float]]:
        """Return what is known of a side before it runs, and what measures it."""
        batch = batch or case.batch
        if name == case.model:
            program = speed.prepare(name, batch=batch, image_size=case.side, dtype=case.dtype, mode=case.mode)
            return program, program.measure
        assert self.peers is not None
        peak = self.peers.load(name, batch=batch, size=case.side, dtype=case.dtype, mode=case.mode)
        return peak, functools.partial(self.peers.measure, name)

    def _turns(
        self, sides: Mapping[str, Callable[[int], float]], seconds: Mapping[str, float], notes: dict[str, str]
    ) -> dict[str, list[float]]:
        """Return the seconds of a step of each side in each round; a side that fails has a note."""
        if not sides:
            return {}
        rounds, _ = steps_for(self.seconds, max(seconds.values()), self.rounds)

        def turn(name: str) -> float:
            with _noted(notes, name):
                if name not in notes:
                    if len(sides) > 1 and seconds[name] < SETTLED:
                        sides[name](1)
                    return sides[name](max(1, round(self.seconds / rounds / seconds[name])))
            return math.nan

        return take_turns({name: functools.partial(turn, name) for name in sides}, rounds)

    def _figures(self, name: str, case: Case, found: Any, times: list[float]) -> dict[str, Any]:
        if name != case.model:
            median, low, high = spread(times)
            figures = {"images/s": case.batch / median, "its quartiles": [case.batch / high, case.batch / low]}
            memory = {"peak memory, MiB": found / MEBIBYTE, "told by": "device"} if found else {}
            return figures | memory
        result = found.result(times, 1, None)
        return {
            "images/s": result.images_per_second,
            "its quartiles": list(result.quartiles),
            "peak memory, MiB": result.memory / MEBIBYTE,
            "told by": result.memory_by,
            "compile, s": result.compile_seconds,
            "multiply-adds, G": result.multiply_adds / 1e9,
        }

    def _latency(self, name: str, case: Case, measure: Callable[[int], float]) -> float | None:
        """Return the milliseconds of one image, measured once for each size and type; ``measure`` is of the case."""
        key = (name, case.side, case.dtype)
        if key not in self.latencies:
            notes: dict[str, str] = {}
            with _noted(notes, name):
                if case.batch != 1:
                    _, measure = self._open(name, case, batch=1)
                self.latencies[key] = 1e3 * waited(measure, self.seconds).median
        return self.latencies.get(key)

    @staticmethod
    def _top1(name: str) -> float | None:
        card = VARIANTS[name].card if name in VARIANTS else None
        return card.top1 if card else PEERS_TOP1.get(name)


def _estimated(estimate: Callable[..., Any], topology: str, case: Case) -> list[dict[str, Any]]:
    """Return the row of a case for a TPU that is not there."""
    row: dict[str, Any] = dict(zip(NAMES, case, strict=False))
    with _noted(row, "note"):
        found = estimate(case.model, batch=case.batch, image_size=case.side, dtype=case.dtype, topology=topology)
        row |= {
            "images/s": found.images_per_second,
            "peak memory, MiB": found.memory / MEBIBYTE,
            "told by": "compiler",
            "compile, s": found.compile_seconds,
            "multiply-adds, G": found.multiply_adds / 1e9,
            "note": "estimate",
        }
    return [row]
