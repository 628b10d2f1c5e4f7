"""Trainings whose results a script gathers: each that has ended is kept, and is not run again."""

import contextlib
import json
import shutil
from pathlib import Path

from evmamba_jax.reports.writer import METRICS, read_rows
from evmamba_jax.training import run
from evmamba_jax.training.config import Config

Rows = list[dict[str, float]]


def rows_of(config: Config, folder: Path) -> Rows:
    """Return the rows of a run's metrics.jsonl; it is run, or gone on with, where it has not ended.

    The folder keeps what the run printed, and its configuration; a run that ended with another one is run again.
    """
    asked, ended = json.loads(config.to_json()), folder / "ended.json"
    if ended.exists() and json.loads(ended.read_text()) != asked:
        shutil.rmtree(folder)
    if not ended.exists():
        print(folder, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            run(config, folder)
        ended.write_text(json.dumps(asked))
    return read_rows(folder / METRICS)
