"""The training loop: evaluate, save, fetch, step, log, in this order, until the last step."""

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from evmamba_jax import __version__, pruning
from evmamba_jax.checkpoints import Checkpoints, find
from evmamba_jax.config import Config
from evmamba_jax.data import loader
from evmamba_jax.errors import UserError
from evmamba_jax.reports import page
from evmamba_jax.reports.curves import curves
from evmamba_jax.reports.drawing import drawn
from evmamba_jax.reports.early_bird import BIRDS, draw_birds
from evmamba_jax.reports.page import REPORT
from evmamba_jax.reports.sparsity import PICTURE, draw_sparsity, write_sparsity
from evmamba_jax.reports.writer import Part, Reporter
from evmamba_jax.storage import owned, storage_errors
from evmamba_jax.tasks import Collector, Figure, Task
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training import resume
from evmamba_jax.training.evaluator import Evaluator, global_batch
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.sparse import ITEM
from evmamba_jax.training.state import TrainState
from evmamba_jax.training.stopping import Stopped, Stopping
from evmamba_jax.weights import average_is_better


def _say(text: str) -> None:
    if meshes.is_main():
        print(text, flush=True)


def train(
    evaluator: Evaluator,
    setup: Setup,
    source: Any,
    workdir: Path,
    *,
    keep_steps: Sequence[int] = (),
    part: Part | None = None,
) -> dict[str, float]:
    """Train from the newest checkpoint of a work folder to the end; return the figures of what the run stands for.

    Args:
        evaluator: of the run's task.
        setup: of the same task.
        source: the training split.
        workdir: the work folder.
        keep_steps: checkpoints of these are made, and stay.
        part: says which of several runs this is.
    """
    task, config = evaluator.task, evaluator.task.config
    total, log_every = setup.total_steps, setup.log_every
    eval_every, save_every = setup.in_steps(config.eval_every), setup.in_steps(config.save_every)
    patience = _patience(config, evaluations=-(-total // eval_every))

    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(Stopping())
        own(workdir, stack)
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                keep_last=config.keep_last,
                keep_best=config.keep_best,
                best_metric=task.chooses.name,
                higher=task.chooses.higher,
                keep_steps=keep_steps,
            )
        )
        try:
            with stopping.at_once():
                start, state, meta = _restore_or_init(setup, checkpoints, source, workdir)
                figures, evaluated = meta["figures"], meta["evaluated"]  # of the last evaluation, and its step
                record = _Record(task.chooses, *meta.get("record", ()))
                if start == evaluated and (start == total or 0 < patience <= record.waited):
                    figures = find(workdir).meta["figures"]
                    print(
                        f"the run in {workdir} has ended at step {start}: {task.told(figures)}; "
                        "another --workdir starts a new one"
                    )
                    return figures
                lengths = {"total_steps": total, "steps_per_epoch": setup.steps_per_epoch}
                report = Reporter(workdir, **lengths, is_main=meshes.is_main(), part=part)
                stack.callback(report.close)
                report.rewind(start)
                if meshes.is_main():
                    with storage_errors(workdir):
                        (workdir / "config.json").write_text(config.to_json() + "\n")
                batches = setup.batches(source, start)
                stack.callback(_close, batches, stopping)
                train_step = stopping.minding(lambda: _compile(setup, report))
                draw = setup.drawing()
        except Stopped as stopped:  # before anything that is not on disk
            _say(f"{stopped.signal.name}: nothing new to save in {workdir}; the same command starts from there")
            raise SystemExit(128 + stopped.signal) from None
        clock = _Clock(config.batch_size)
        collector: Collector | None = None

        def save(step: int, state: TrainState) -> None:
            _check_finite(task, state, checkpoints, source, report)
            report.flush()
            metrics = {task.chooses.name: best_of(task.chooses, figures)} if evaluated == step else None
            told = about(task, step, figures, evaluated, source) | {"record": record.noted}
            if patience and config.keep_best:
                told["stands_for"] = record.step
            checkpoints.save(step, state.items(), meta=told, metrics=metrics)
            clock.restart()

        def leave(stop: signal.Signals, step: int, state: TrainState) -> NoReturn:
            save(step, state)
            checkpoints.wait()
            report.line(f"{stop.name}: step {step} is saved in {workdir}; the same command continues from there")
            raise SystemExit(128 + stop) from None

        for step in range(start, total + 1):
            stop = stopping.received()
            if step != evaluated and not stop and (step == total or (step > 0 and step % eval_every == 0)):
                _check_finite(task, state, checkpoints, source, report)
                may_be_last = step == total or record.waited + 1 == patience
                try:
                    evaluate = functools.partial(
                        evaluator, state.model, state.ema, pictures=may_be_last, check=stopping.check
                    )
                    evaluation = stopping.minding(evaluate)
                    figures, collector = evaluation.figures, evaluation.collector
                except Stopped as stopped:  # the next start evaluates this step
                    leave(stopped.signal, step, state)
                evaluated = step
                record.note(step, best_of(task.chooses, figures))
                report.log_eval(step, figures)
                save(step, state)
                if step < total and record.waited == patience > 0:
                    report.line(f"early stopping: {patience} evaluations found nothing better than step {record.step}")
                    total = step
            elif stop:
                leave(stop, step, state)
            elif step in keep_steps or (step > start and step % save_every == 0):
                save(step, state)
            if step == total:
                break
            if setup.sparse.due(step):  # after the save, so that a run that resumes here draws the same again
                state = draw(state, setup.sparse.zeros(step))
                if words := setup.sparse.told(state, step):
                    report.line(words)

            try:
                with stopping.at_once(), clock.waiting_for_input():
                    rows = next(batches)
            except Stopped as stopped:
                leave(stopped.signal, step, state)
            state = train_step(state, global_batch(setup.mesh, rows))
            clock.steps += 1

            if (step + 1) % log_every == 0 or step + 1 == total:
                _check_finite(task, state, checkpoints, source, report)
                window = {name: float(value) for name, value in jax.device_get(state.window).items()}
                mean = {name: window[name] / window["steps"] for name in ("loss", "grad_norm", *task.parts)}
                metrics = {"loss": mean.pop("loss"), "lr": float(np.asarray(setup.schedule(step))), **mean}
                metrics |= setup.sparse.figures(state)
                if config.data.on_corrupt == "skip":
                    metrics["corrupt"] = window["corrupt"]
                report.log_train(step + 1, metrics, clock.speed())
                clock.restart()

        checkpoints.wait()
        best, shown = find(workdir).meta["step"], figures
        try:
            if best != total:  # what the run stands for is what its pictures and its report show
                report.line(f"the run stands for step {best}, the best")
                variables, _ = evaluator.weights(workdir)
                evaluate = functools.partial(evaluator, *variables, pictures=True, check=stopping.check)
                evaluation = stopping.minding(evaluate)
                shown, collector = evaluation.figures, evaluation.collector
            with stopping.at_once():
                if setup.sparse.active:
                    _write_sparsity(setup, state, workdir)
                _draw(evaluator, workdir, collector, shown, best)
        except Stopped as stopped:
            leave(stopped.signal, total, state)
        report.summary(f"{config.model.name} on {config.data.name}, step {best}: {task.told(shown)}; see {workdir}")
    return shown


@dataclasses.dataclass
class _Record:
    """The best that evaluations of the run have found, and how many in a row have found nothing better since."""

    chooses: Figure
    value: float = math.nan
    step: int = 0
    waited: int = 0

    def note(self, step: int, value: float) -> None:
        better = value > self.value if self.chooses.higher else value < self.value
        if better or math.isnan(self.value):
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def noted(self) -> tuple[float, int, int]:
        return self.value, self.step, self.waited


def _patience(config: Config, *, evaluations: int) -> int:
    """Return after how many evaluations without a better one the run ends, 0 for never."""
    if config.early_stopping >= evaluations > 0:
        raise UserError(
            f"config.early_stopping is {config.early_stopping}, and the run has {evaluations} evaluations, so it could "
            "never end early: set fewer, or evaluate more often with --config.eval_every"
        )
    return config.early_stopping


def own(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Own the work folder until the stack is left; of several processes the first does, and all learn if it can."""
    refusal: UserError | None = None
    if meshes.is_main():
        try:
            stack.enter_context(owned(workdir))
        except UserError as error:
            refusal = error
    if jax.process_count() > 1:
        owns = bool(multihost_utils.broadcast_one_to_all(np.bool_(refusal is None)))
        refusal = refusal or (None if owns else UserError(f"the first process cannot have the work folder {workdir}"))
    if refusal is not None:
        raise refusal


def _close(batches: loader.Batches, stopping: Stopping) -> None:
    """Stop reading; a run that a signal ends does not wait for a reader that hangs."""
    with contextlib.suppress(Stopped):
        stopping.minding(batches.close)


def _draw(
    evaluator: Evaluator, workdir: Path, collector: Collector | None, figures: Mapping[str, float], step: int
) -> None:
    """Draw what the last evaluation collected, the curves, the report; the state is on disk, and none ends a run."""
    if not meshes.is_main():
        return
    task = evaluator.task
    if collector is not None:
        drawn("the last evaluation", lambda: task.pictures(workdir, collector))
    drawn("curves.png", lambda: curves(workdir, task.chooses.name, task.chooses.title, task.parts))
    drawn(REPORT, lambda: _report(evaluator, workdir, collector, figures, step))


def _write_sparsity(setup: Setup, state: TrainState, workdir: Path) -> None:
    """Write what is pruned at the end; every process gives its part of the masks."""
    gather = jax.jit(lambda s: (setup.sparse.masks(s), s.extra[ITEM]), out_shardings=meshes.replicated(setup.mesh))
    masks, item = jax.device_get(gather(state))
    rows = pruning.table(state.model.params, masks)
    if not meshes.is_main():
        return
    task = setup.task
    with storage_errors(workdir):
        write_sparsity(workdir, rows)
    if (birds := setup.sparse.birds(item)) is not None:
        drawn(BIRDS, lambda: draw_birds(workdir, *birds, task.config.pruning.limit))
    chooses, dense = task.chooses, task.config.pruning.dense
    drawn(PICTURE, lambda: draw_sparsity(workdir, rows, chooses.name, chooses.title, dense))


def _report(
    evaluator: Evaluator, workdir: Path, collector: Collector | None, figures: Mapping[str, float], step: int
) -> None:
    """Write report.html: what the run found, how it went, what was noted about its data, and how to go on."""
    task, config = evaluator.task, evaluator.task.config
    better = average_is_better(figures, task.chooses.name, task.chooses.higher)
    whose = "moving average" if better else "parameters"
    found = task.sections(collector, f"{config.model.name}, step {step}, {whose}") if collector is not None else []
    findings = getattr(evaluator.source, "findings", ())
    given = f"evmamba train --config FILE --workdir {shlex.quote(str(workdir))}"
    if any(argument.startswith("--config") for argument in sys.argv):  # this process is the command
        given = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    commands = f"evmamba predict --weights {shlex.quote(str(workdir))} --csv found.csv FOLDER\n{given}"
    drawing = workdir / "curves.png"
    went = (
        page.picture(drawing, "loss, evaluations and learning rate") if drawing.is_file() else page.text("Not drawn.")
    )
    sections = [
        page.Section(
            "In short",
            page.text(f"{task.told(figures)}; step {step}.")
            + page.text(f"The {whose} of the weights: what this evaluation found better, and later commands take."),
        ),
        *found,
        page.Section("How it went", went),
        page.Section("About the data", page.lines(findings) if findings else page.text("Nothing was noted.")),
        page.Section("Predict, and go on from the newest checkpoint", page.code(commands)),
        page.Section("Configuration", page.folded("all values", page.code(config.to_json()))),
    ]
    page.write_page(workdir / REPORT, f"{config.model.name} on {config.data.name}: {workdir.name}", sections)


def best_of(chooses: Figure, figures: Mapping[str, float]) -> float:
    """Return the better of the parameters' figure and the moving average's."""
    values = [figures[name] for name in (chooses.name, f"ema_{chooses.name}") if name in figures]
    return max(values) if chooses.higher else min(values)


def about(task: Task, step: int, figures: dict[str, float], evaluated: int | None, source: Any) -> dict[str, Any]:
    """Return what a checkpoint says about itself."""
    config = task.config
    return {
        "model": config.model.name,
        **task.meta(),
        "step": step,
        "figures": figures,
        "evaluated": evaluated,
        "ema": config.optim.ema_decay > 0,
        "chooses": {"figure": task.chooses.name, "higher": task.chooses.higher},
        "config": json.loads(config.to_json()),
        "data": resume.data_facts(source),
        "versions": {"evmamba-jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
    }


def _compile(setup: Setup, report: Reporter) -> Callable[[TrainState, dict[str, jax.Array]], TrainState]:
    """Return the compiled train step and report the time it took."""
    started, known = time.perf_counter(), "compiled" in vars(setup)  # by an earlier run
    _ = setup.compiled
    if not known:
        seconds = time.perf_counter() - started
        report.line(f"compiled the train step for {setup.mesh.size} device(s) in {seconds:.1f} s")
        report.log_speed({"compile_seconds": seconds})
    return lambda state, batch: setup.program(batch)(state, batch)


def _restore_or_init(
    setup: Setup, checkpoints: Checkpoints, source: Any, workdir: Path
) -> tuple[int, TrainState, dict[str, Any]]:
    """Return step, state and meta: of the newest whole checkpoint, of ``init_from``, or of a fresh model."""
    stored = checkpoints.restore_meta()
    if stored is not None:
        resume.check_settings(stored, setup.task, source, workdir)
    restored = checkpoints.restore(setup.abstract_state.items())
    if restored is None:
        return 0, setup.first_state(), {"figures": {}, "evaluated": None}
    step, items, meta = restored
    resume.check_model(meta, setup.task, workdir)
    resume.check_length(step, setup.total_steps, workdir)
    return step, TrainState.of_items(items), meta


def _check_finite(task: Task, state: TrainState, checkpoints: Checkpoints, source: Any, report: Reporter) -> None:
    """Stop the run at a loss or gradient that is not finite, with the state before it on disk."""
    last = {name: float(value) for name, value in jax.device_get(state.last).items()}
    bad = next((name for name, value in last.items() if not np.isfinite(value)), None)
    if bad is None:
        return
    step = int(state.step)
    before = dataclasses.replace(state, last=jax.tree.map(jnp.zeros_like, state.last))
    report.flush()
    checkpoints.save(step, before.items(), meta=about(task, step, {}, None, source))
    checkpoints.wait()
    raise UserError(
        f"{bad} is {last[bad]} at step {step + 1}; the state before it, step {step}, is saved: "
        "start again with a lower --config.optim.lr, or with --config.model.dtype=float32"
    )


class _Clock:
    """Images per second and the share of time spent waiting for input, since the last log line."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def speed(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        return {"images_per_second": self.steps * self.batch_size / elapsed, "input_wait": self.waited / elapsed}
