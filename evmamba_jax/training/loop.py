"""The training loop: evaluate, save, fetch, step, log, in this order, until the last step."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from evmamba_jax import __version__
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.config import Config
from evmamba_jax.data import loader
from evmamba_jax.errors import UserError
from evmamba_jax.reports.curves import curves
from evmamba_jax.reports.writer import Reporter
from evmamba_jax.storage import storage_errors
from evmamba_jax.tasks import Figure, Task, task_of
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.evaluator import Evaluator, global_batch
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.state import TrainState


def run(config: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Train (or, with ``config.eval_only``, evaluate) and return the figures of the last evaluation.

    A work folder that holds checkpoints is resumed: the run continues to the bit as if it had never stopped.

    Args:
        config: what to run.
        workdir: folder for config.json, metrics.jsonl, speed.jsonl, tensorboard/, checkpoints/ and the pictures; an
            evaluation alone writes per_class.csv and, if asked for, confusion.png.

    Raises:
        UserError: any mistake of the user's, in one line; a loss that is not finite.
        SystemExit: after SIGTERM or SIGINT, once the state is saved; its code is 128 + the signal's number.
    """
    kind = task_of(config)
    meshes.join_processes(config.distributed)
    mesh = meshes.make_mesh(config)
    source = kind.open_source(config, config.data.eval_split, Path(workdir))
    if _is_main():
        for finding in getattr(source, "findings", ()):
            print(f"data: {finding}")
    evaluator = Evaluator(kind(config, source.class_names), mesh, source)
    if config.eval_only:
        return _evaluate_only(evaluator, Path(workdir))
    return _train(evaluator, kind.open_source(config, config.data.train_split, Path(workdir)), Path(workdir))


def _is_main() -> bool:
    return jax.process_index() == 0


def _evaluate_only(evaluator: Evaluator, workdir: Path) -> dict[str, float]:
    """Evaluate ``init_from``, or the newest checkpoint of the work folder; write the task's tables."""
    task, config = evaluator.task, evaluator.task.config
    place = config.init_from or workdir
    if place == workdir and not workdir.is_dir():
        raise UserError(
            f"there is no run in {workdir} to evaluate; name its --workdir, or set --config.init_from to official "
            "weights or a folder of ours"
        )
    weights = task.load(place, ema=False)
    model, ema, taken = weights.variables, None, weights.taken
    if weights.meta.get("ema"):
        ema = task.load(place, ema=True).variables
        taken = f"{weights.place}, parameters and moving average"
    if _is_main():
        with storage_errors(workdir):  # found out now, not after the evaluation
            workdir.mkdir(parents=True, exist_ok=True)
        print(f"weights: {taken}")
    evaluation = evaluator(*jax.device_put((model, ema), meshes.replicated(evaluator.mesh)), detailed=True)
    if _is_main():
        whose = f"{config.model.name} of {place}"
        written = task.tables(workdir, evaluation.sums, evaluation.best, whose)
        see = f"; see {' and '.join(str(workdir / name) for name in written)}" if written else ""
        print(f"{whose} on {config.data.name}: {task.told(evaluation.figures)}{see}")
    return evaluation.figures


def _train(evaluator: Evaluator, source: Any, workdir: Path) -> dict[str, float]:
    task, config = evaluator.task, evaluator.task.config
    setup = Setup(task, evaluator.mesh, len(source))
    total, log_every = setup.total_steps, setup.log_every
    eval_every, save_every = setup.in_steps(config.eval_every), setup.in_steps(config.save_every)

    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_Stopping())
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                keep_last=config.keep_last,
                keep_best=config.keep_best,
                best_metric=task.chooses.name,
                higher=task.chooses.higher,
            )
        )
        start, state, meta = _restore_or_init(setup, checkpoints, workdir)
        figures, evaluated = meta["figures"], meta["evaluated"]  # of the last evaluation, and its step
        if start == evaluated == total:
            print(
                f"the run in {workdir} has ended at step {total}: {task.told(figures)}; "
                "another --workdir starts a new one"
            )
            return figures
        report = Reporter(workdir, total_steps=total, steps_per_epoch=setup.steps_per_epoch, is_main=_is_main())
        stack.callback(report.close)
        report.rewind(start)
        if _is_main():
            with storage_errors(workdir):
                (workdir / "config.json").write_text(config.to_json() + "\n")
        batches = stack.enter_context(
            loader.train_batches(
                config.data,
                source,
                seed=config.seed,
                global_batch=config.batch_size,
                start_step=start,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                reader=task.reader(),
            )
        )
        train_step = _compile(setup, report)
        clock = _Clock(config.batch_size)

        for step in range(start, total + 1):
            stop = stopping.at(step)
            evaluate = step != evaluated and not stop and (step == total or (step > 0 and step % eval_every == 0))
            save = evaluate or (step > start and bool(stop or step % save_every == 0))
            if save:
                _check_finite(task, state, checkpoints, report)

            if evaluate:
                figures, _, _, collector = evaluator(state.model, state.ema, pictures=step == total)
                evaluated = step
                if step == total and collector is not None and _is_main():
                    task.pictures(workdir, collector)
                report.log_eval(step, figures)
            if save:
                report.flush()
                metrics = {task.chooses.name: _best(task.chooses, figures)} if evaluated == step else None
                checkpoints.save(step, state.items(), meta=_meta(task, step, figures, evaluated), metrics=metrics)
                clock.restart()
            if stop:
                checkpoints.wait()
                report.line(f"{stop.name}: step {step} is saved in {workdir}; the same command continues from there")
                raise SystemExit(128 + stop)
            if step == total:
                break

            with clock.waiting_for_input():
                batch = global_batch(setup.mesh, next(batches))
            state = train_step(state, batch)
            clock.steps += 1

            if (step + 1) % log_every == 0 or step + 1 == total:
                _check_finite(task, state, checkpoints, report)
                window = {name: float(value) for name, value in jax.device_get(state.window).items()}
                mean = {name: window[name] / window["steps"] for name in ("loss", "grad_norm", *task.parts)}
                metrics = {"loss": mean.pop("loss"), "lr": float(np.asarray(setup.schedule(step))), **mean}
                if config.data.on_corrupt == "skip":
                    metrics["corrupt"] = window["corrupt"]
                report.log_train(step + 1, metrics, clock.speed())
                clock.restart()

        checkpoints.wait()
        if _is_main():
            curves(workdir, task.chooses.name, task.chooses.title, task.parts)
        report.summary(f"{config.model.name} on {config.data.name}, step {total}: {task.told(figures)}; see {workdir}")
    return figures


def _best(chooses: Figure, figures: Mapping[str, float]) -> float:
    """Return the better of the parameters' figure and the moving average's."""
    values = [figures[name] for name in (chooses.name, f"ema_{chooses.name}") if name in figures]
    return max(values) if chooses.higher else min(values)


def _meta(task: Task, step: int, figures: dict[str, float], evaluated: int | None) -> dict[str, Any]:
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
        "config": dataclasses.asdict(config),
        "versions": {"evmamba-jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
    }


def _compile(setup: Setup, report: Reporter) -> Callable[[TrainState, dict[str, jax.Array]], TrainState]:
    """Return the compiled train step and report the time it took."""
    started = time.perf_counter()
    compiled = setup.lower().compile()
    seconds = time.perf_counter() - started
    report.line(f"compiled the train step for {setup.mesh.size} device(s) in {seconds:.1f} s")
    report.log_speed({"compile_seconds": seconds})
    return compiled


def _restore_or_init(setup: Setup, checkpoints: Checkpoints, workdir: Path) -> tuple[int, TrainState, dict[str, Any]]:
    """Return step, state and meta: of the newest whole checkpoint, of ``init_from``, or of a fresh model."""
    stored = checkpoints.restore_meta()
    if stored is not None:
        for name in ("batch_size", "seed"):
            there, here = stored["config"][name], getattr(setup.task.config, name)
            if there != here:
                raise UserError(
                    f"config.{name} is {here}, but the run in {workdir} was started with {there}, on which the order "
                    f"of its data depends: set --config.{name}={there}, or choose another --workdir"
                )
    restored = checkpoints.restore(setup.abstract_state.items())
    if restored is None:
        return 0, setup.first_state(), {"figures": {}, "evaluated": None}
    step, items, meta = restored
    return step, TrainState.of_items(items), meta


def _check_finite(task: Task, state: TrainState, checkpoints: Checkpoints, report: Reporter) -> None:
    """Stop the run at a loss or gradient that is not finite, with the state before it on disk."""
    last = {name: float(value) for name, value in jax.device_get(state.last).items()}
    bad = next((name for name, value in last.items() if not np.isfinite(value)), None)
    if bad is None:
        return
    step = int(state.step)
    before = dataclasses.replace(state, last=jax.tree.map(jnp.zeros_like, state.last))
    report.flush()
    checkpoints.save(step, before.items(), meta=_meta(task, step, {}, None))
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


class _Stopping(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT, so that the loop can save and leave; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "_Stopping":
        # With several processes jax.distributed catches SIGTERM itself and lets all agree on one step.
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self.previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"{self.received.name}: saving after this step; Ctrl-C leaves at once\n".encode())

    def at(self, step: int) -> signal.Signals | None:
        """Return the signal that asks to stop before ``step``, the same on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self.received
