"""Ways to fine-tune: a step's cost beside a full one's, and a linear probe beside scikit-learn's logistic regression.

``train_tpu.py``'s step trains a small EfficientVMamba on images of 64 pixels, one way after the other in turns. A model
trained on the digits for one epoch gives the features; both classifiers learn from the same vectors.

    python benchmarks/finetune.py [--runs 9] [--out FILE]
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lib.timing import interleaved
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from configs import digits
from evmamba_jax.data.loader import eval_batches
from evmamba_jax.data.sources import open_source
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.predict import Predictor
from evmamba_jax.tasks import task_of
from evmamba_jax.training import run
from evmamba_jax.training.config import Config, Duration
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup

WAYS = ("full", "lora", "head")
BATCH = 32


def step_of(way: str) -> tuple[Any, Any, Any]:
    """Return the compiled step of a way to fine-tune, its first state and a batch."""
    config = digits.get_config()
    config.model.options, config.batch_size = {"width": 24, "depths": (2, 2, 2, 2)}, BATCH
    config.data.image_size, config.tune.method, config.optim.ema_decay = 64, way, 0.0
    task = task_of(config)(config, [str(k) for k in range(10)])
    setup = Setup(task, make_mesh(config, jax.devices()[:1]), 1437)
    compiled = setup.lower().compile()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, 64, 64, 1), np.uint8),
        "label": rng.integers(0, 10, BATCH).astype(np.int32),
        "corrupt": np.zeros(BATCH, np.int32),
    }
    return compiled, setup.first_state(), jax.device_put(batch)


def costs(report: Report, runs: int) -> None:
    """Time a step of each way, and say what memory it needs beside its arguments."""
    steps = {way: step_of(way) for way in WAYS}
    states = {way: state for way, (_, state, _) in steps.items()}

    def one(way: str) -> None:
        compiled, _, batch = steps[way]
        states[way] = jax.block_until_ready(compiled(states[way], batch))

    for way in WAYS:
        one(way)
    seconds = interleaved({way: lambda way=way: one(way) for way in WAYS}, runs)
    memory = {way: compiled.memory_analysis().temp_size_in_bytes / 2**20 for way, (compiled, *_) in steps.items()}
    report.table("tune.method", ("step, ms", "{:.0f}"), ("of full", "{:.2f}"), ("temporaries, MiB", "{:.0f}"))
    for way in WAYS:
        report.row(way, 1e3 * seconds[way], seconds[way] / seconds["full"], memory[way])


def quiet(config: Config, workdir: Path) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        return run(config, workdir)


def features(weights: Path, config: Config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what enters the head for each image of a split, and the labels."""
    predictor, vectors, labels = Predictor(weights, ema=False), [], []
    with eval_batches(config.data, open_source(config.data, split), global_batch=BATCH) as batches:
        for batch in batches:
            real = batch["weight"] > 0
            vectors.append(predictor.answers(batch["image"])[1][real])
            labels.append(batch["label"][real])
    return np.concatenate(vectors), np.concatenate(labels)


def probe(report: Report, folder: Path) -> None:
    """Compare a linear probe with logistic regression on the same features."""
    config = digits.get_config()
    config.duration, config.optim.warmup = Duration(epochs=1), Duration(steps=5)
    config.eval_every = config.save_every = Duration(epochs=1)
    quiet(config, folder / "start")

    config = digits.get_config()
    config.tune.method, config.init_from = "head", str(folder / "start")
    config.duration, config.eval_every, config.save_every = (Duration(epochs=n) for n in (20, 20, 20))
    config.optim.lr, config.optim.weight_decay, config.optim.ema_decay = 0.03, 0.0, 0.0
    config.data.crop_scale, config.data.crop_ratio, config.data.hflip = (1.0, 1.0), (1.0, 1.0), 0.0
    config.data.mixup = config.data.label_smoothing = 0.0
    ours = quiet(config, folder / "probe")["top1"]

    train, test = (features(folder / "start", config, split) for split in ("train", "test"))
    search = GridSearchCV(LogisticRegression(max_iter=10_000), {"C": np.logspace(-2, 4, 13)}, scoring="neg_log_loss")
    theirs = 100 * search.fit(*train).best_estimator_.score(*test)
    report.table("on the same features of the digits", ("right of 360 test images, %", "{:.2f}"))
    report.row("linear probe, `tune.method=head`", ours)
    report.row("scikit-learn's LogisticRegression, C by 5 folds of the training images", theirs)
    report.row("difference", ours - theirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "Ways to fine-tune",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "scikit-learn"),
        date=machine.today(),
    )
    costs(report, options.runs)
    with tempfile.TemporaryDirectory() as name:
        probe(report, Path(name))


if __name__ == "__main__":
    main()
