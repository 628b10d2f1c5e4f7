"""Compile the exact train step for a TPU or GPU system that is not here, and say what it would need.

    python -m evmamba_jax.preflight --config configs/evmamba_t.py --topology v5e-256
    python -m evmamba_jax.preflight --config configs/evmamba_t.py --topology v5p-128 --fast --config.batch_size=4096

The configuration is given as for a training.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from evmamba_jax import cli, packaged
from evmamba_jax.errors import UserError
from evmamba_jax.measuring import machine
from evmamba_jax.preflight import aot, gpu
from evmamba_jax.preflight.batch import largest_batch
from evmamba_jax.preflight.program import Request
from evmamba_jax.preflight.report import needed, report
from evmamba_jax.tasks import task_of
from evmamba_jax.training import parse_command

GRANULE = 8  # images: the search for a batch goes in rows of a TPU's registers
LEAST_MEMORY = 2e9  # bytes: the smallest step of the tests takes 1.2e9


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.preflight") -> int:
    """Run the command with ``argv``; return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return cli.main(lambda: _preflight(arguments, _parser(prog)))


def _parser(prog: str) -> cli.Parser:
    parser = cli.Parser(
        prog=prog,
        usage="%(prog)s --config NAME|FILE[:VARIANT] --topology NAME [options] [--config.KEY=VALUE ...]",
        description=(
            "Compile the exact train step for a TPU or GPU system that is not here, and say what it would need.\n"
            "No data set is needed. Exit code: 0 it fits, 1 it does not compile or fit, 2 a mistake in the command."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=packaged.help_text(),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="v5e-N, v6e-N (N chips); v4-N, v5p-N, tpu7x-N (N TensorCores, two a chip); 2xv5e-256 is two slices; "
        "a100-N, h100-N, h200-N (N GPUs): as far as a compiler without a GPU goes",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compile with less optimization: sooner, with less memory; its time is too long, the rest holds",
    )
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="also search the largest batch of a device that fits (compiles several times, with --fast)",
    )
    parser.add_argument(
        "--export", default="", metavar="FILE", help="write the lowered step, which jax.export.deserialize reads"
    )
    return parser


def _preflight(argv: list[str], parser: cli.Parser) -> int:
    if not argv:
        parser.print_help()
        return 2
    options, request = _parse(argv, parser)
    facts = inspect(request, fast=options.fast)
    print(report(facts, fast=options.fast), flush=True)
    if options.find_batch:
        print(f"\n{_find_batch(request, facts, fast=options.fast)}")
    return 0 if needed(facts) <= facts["available"] else 1


def _parse(argv: list[str], parser: cli.Parser) -> tuple[argparse.Namespace, Request]:
    """Read the command and refuse at once what needs no compiler to be seen."""
    options, rest = parser.parse_known_args(argv)
    if not options.topology:
        raise UserError("--topology is missing: v5e-8, v5e-256, v4-32, h100-8 ...; see --help")
    config, _ = parse_command([parser.prog, *rest])
    task_of(config)  # checks it
    if gpu.is_gpu(options.topology):
        gpu.parse_name(options.topology)
    else:
        try:
            aot.topology(options.topology)
        except ValueError as error:
            raise UserError(f"--topology: {error}") from error
    if options.export:
        _check_export(Path(options.export))
    available = machine.free_memory()
    if available < LEAST_MEMORY:
        raise UserError(
            f"this machine is too small: {available / 1e9:.1f} GB of memory are free, and the compiler takes more than "
            f"{LEAST_MEMORY / 1e9:.1f} GB; end other programs, or take another machine"
        )
    return options, Request(
        rest, options.topology, export=str(Path(options.export).absolute()) if options.export else ""
    )


def _check_export(file: Path) -> None:
    """Refuse now what would otherwise fail after a minute."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            '--export needs flatbuffers: pip install flatbuffers (in a clone: pip install -e ".[preflight]")'
        )
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UserError(f"--export {file} cannot be written: it must be a file in a folder that exists and is yours")


def _find_batch(request: Request, facts: dict[str, Any], *, fast: bool) -> str:
    """Search the largest batch of a device; return the result in words."""
    devices, granule = facts["devices"], GRANULE * facts["accumulation"]
    start = facts["batch_size"] // devices

    def compile_for(batch: int) -> float:
        if batch == start and fast:
            return needed(facts)
        trial = dataclasses.replace(request, batch_per_device=batch, export="", timed=False)
        need = needed(inspect(trial, fast=True))
        print(f"batch {batch} a device: {need / 2**30:.2f} GiB", file=sys.stderr)
        return need

    fits, fails, tried = largest_batch(compile_for, start=start, granule=granule, available=facts["available"])
    if not fits:
        return f"No multiple of {granule} images a device fits: even {fails} take more than there is."
    beyond = f"{fails} do not" if fails else "larger ones were not tried"
    return (
        f"Largest batch found to fit: {fits} a device, config.batch_size={fits * devices} "
        f"({tried[fits] / 2**30:.2f} of {facts['available'] / 2**30:.2f} GiB; {beyond}; compiled with --fast)"
    )


def inspect(request: Request, *, fast: bool) -> dict[str, Any]:
    """Let another process compile as asked for, show how it gets on, and return the facts."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",  # the process that compiles uses no device, should there be one
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a step for 256 chips would fill it
    }
    if fast:
        environment["JAX_OPTIMIZATION_LEVEL"] = "O1"
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as dump_folder:
        text = json.dumps(dataclasses.asdict(request))
        command = [sys.executable, "-m", "evmamba_jax.preflight.program", text, dump_folder]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
            _Progress(process.pid) as progress,
        ):
            answer: dict[str, Any] = {}
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    answer = json.loads(line)
                    progress.stage = answer.get("stage", progress.stage)
                code = process.wait()
            finally:
                process.kill()  # where this one is interrupted
        if "error" in answer:
            raise UserError(answer["error"])
        if "facts" not in answer:
            log.seek(0)
            raise UserError(_death(code, progress, log.read()))
    return answer["facts"] | {"peak_rss": progress.peak}


def _death(code: int, progress: "_Progress", log: str) -> str:
    """Return why the compiling process may have ended without an answer."""
    if -code == signal.SIGKILL:
        return (
            f"this machine is too small: the compiler was killed at {progress.peak / 1e9:.1f} GB while "
            f"{progress.stage}; try --fast, end other programs, or take a machine with more memory"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"the compiler ended with code {code} while {progress.stage}: {lines[-1][:300] if lines else 'no message'}"


class _Progress:
    """Shows on standard error what a process does, for how long, and how much memory it has had."""

    def __init__(self, pid: int):
        self.stage = "starting"
        self.peak = 0.0  # bytes
        self._pid, self._began, self._stop = pid, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> "_Progress":
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stop.set()
        self._thread.join()

    def _show(self) -> None:
        told, since = "", 0.0
        live = sys.stderr.isatty()
        while not self._stop.wait(0.2):
            self._measure()
            seconds = time.monotonic() - self._began
            if live:
                print(f"\r\033[K{seconds:4.0f} s  {self.stage} ({self.peak / 1e9:.1f} GB)", end="", file=sys.stderr)
            elif self.stage != told or seconds - since > 30:
                print(f"{seconds:4.0f} s  {self.stage} ({self.peak / 1e9:.1f} GB)", file=sys.stderr)
                told, since = self.stage, seconds
            sys.stderr.flush()
        if live:
            print("\r\033[K", end="", file=sys.stderr)

    def _measure(self) -> None:
        try:
            status = Path(f"/proc/{self._pid}/status").read_text()
            self.peak = max(self.peak, 1024 * float(status.partition("VmHWM:")[2].split()[0]))
        except (OSError, IndexError, ValueError):  # ended already, or not Linux
            pass


if __name__ == "__main__":
    sys.exit(main())
