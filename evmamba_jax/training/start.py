"""From a configuration to a run: an evaluation alone, one training, or level after level."""

import os
from pathlib import Path

from evmamba_jax.config import Config
from evmamba_jax.errors import UserError
from evmamba_jax.storage import allow_open_files, local, storage_errors
from evmamba_jax.tasks import task_of
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.evaluator import Evaluator
from evmamba_jax.training.loop import train
from evmamba_jax.training.lottery import train_levels
from evmamba_jax.training.setup import Setup


def run(config: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Train (or, with ``config.eval_only``, evaluate) and return the figures of what the run then stands for.

    A work folder that holds checkpoints is resumed: the run continues to the bit as if it had never stopped. In a
    thread that is not the main one signals are left to the main thread.

    Args:
        config: what to run.
        workdir: folder on a disk of this machine for config.json, metrics.jsonl, speed.jsonl, tensorboard/,
            checkpoints/, the pictures and report.html; an evaluation alone writes per_class.csv and, if asked for,
            confusion.png.

    Raises:
        UserError: any mistake of the user's, in one line; a loss that is not finite; a work folder whose run is alive.
        SystemExit: after SIGTERM or SIGINT, once the state is saved; its code is 128 + the signal's number.
    """
    kind = task_of(config)
    folder = local(workdir)
    allow_open_files()
    meshes.join_processes(config.distributed)
    mesh = meshes.make_mesh(config)
    source = kind.open_source(config, config.data.eval_split, folder)
    if meshes.is_main():
        for finding in getattr(source, "findings", ()):
            print(f"data: {finding}")
    evaluator = Evaluator(kind(config, source.class_names), mesh, source)
    if config.eval_only:
        return _evaluate_only(evaluator, folder)
    train_source = kind.open_source(config, config.data.train_split, folder)
    evaluator.task.see(train_source)
    setup = Setup(evaluator.task, mesh, len(train_source))
    if config.pruning.method == "imp":
        return train_levels(evaluator, setup, train_source, folder)
    return train(evaluator, setup, train_source, folder)


def _evaluate_only(evaluator: Evaluator, workdir: Path) -> dict[str, float]:
    """Evaluate ``init_from``, or what the work folder stands for; write the task's tables."""
    task, config = evaluator.task, evaluator.task.config
    place = config.init_from or workdir
    if place == workdir and not workdir.is_dir():
        raise UserError(
            f"there is no run in {workdir} to evaluate; name its --workdir, or set --config.init_from to official "
            "weights or a folder of ours"
        )
    variables, taken = evaluator.weights(place)
    if meshes.is_main():
        with storage_errors(workdir):  # found out now, not after the evaluation
            workdir.mkdir(parents=True, exist_ok=True)
        print(f"weights: {taken}")
    evaluation = evaluator(*variables, detailed=True)
    if meshes.is_main():
        whose = f"{config.model.name} of {place}"
        found = evaluation.sums, evaluation.collectors, evaluation.best
        written = task.tables(workdir, *found, whose, evaluator.source)
        see = f"; see {' and '.join(str(workdir / name) for name in written)}" if written else ""
        print(f"{whose} on {config.data.name}: {task.told(evaluation.figures)}{see}")
    return evaluation.figures
