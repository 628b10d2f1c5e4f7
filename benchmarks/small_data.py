"""Fine-tuning with 50, 500 and 5,000 pictures: the curves of docs/small_data.md.

    apt-get install dataset-fashion-mnist tuxpaint-stamps-default
    python benchmarks/small_data.py [PART ...] [--seeds 1] [--work DIR] [--out FILE]

A part takes less than 20 minutes on two cores, a seed of one that has several: ``backbones`` trains a small
EfficientVMamba on Fashion-MNIST and one on stamps; ``stamps``, ``clothes`` and ``digits`` start from the one that has
not seen such pictures; ``rates`` and ``length`` vary one thing on 500 digits. Each run that has ended is kept in the
work folder, and the results are written anew after each part, so the command can be stopped and started again.
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from lib.runs import Rows, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import stamps
from evmamba_jax import cli
from evmamba_jax.errors import UserError
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.reports.drawing import COLOURS, GREY
from evmamba_jax.training.config import Config, Duration

ROOT = Path(__file__).parent.parent
METHODS = {"scratch": "from scratch", "head": "linear probe", "lora": "LoRA", "full": "full fine-tuning"}
MARKERS = dict(zip(METHODS, "osD^", strict=True))
RATES = {"scratch": 2e-3, "head": 3.2e-2, "lora": 8e-3, "full": 2e-3}  # the best of part "rates", or near it
EPOCHS = {50: 40, 500: 20, 1437: 8, 5000: 5}  # by the number of pictures


class Target(NamedTuple):
    """What is learned: the data set, the pictures that test, the backbone to start from, numbers of pictures."""

    name: str
    test: str
    backbone: str
    sizes: tuple[int, ...]


TARGETS = {
    "stamps": Target("stamps", "test", "clothes", (50, 500, 5000)),
    "clothes": Target("fashion_mnist_debian", "test[:1000]", "stamps", (50, 500, 5000)),
    "digits": Target("digits", "test", "clothes", (50, 500, 1437)),
}


def small(target: Target, epochs: float, seed: int = 0) -> Config:
    """Return the configuration of stamps for the pictures of a target, smaller."""
    config = stamps.get_config()
    config.data = dataclasses.replace(config.data, name=target.name, eval_split=target.test, image_size=32)
    if target.name == "digits":
        config.data.hflip = 0.0
    config.duration, config.seed, config.save_every = Duration(epochs=epochs), seed, Duration(epochs=epochs)
    config.optim.warmup = Duration(epochs=epochs / 10)
    return config


def backbone(name: str, work: Path) -> tuple[Path, Rows]:
    """Return the folder of a model trained on all of its pictures, and the rows of that run."""
    config = small(TARGETS[name], epochs={"clothes": 1, "stamps": 10}[name])
    config.eval_every = config.duration
    folder = work / "backbones" / name
    return folder, rows_of(config, folder)


def tuned(
    target: str, pictures: int, method: str, work: Path, *, seed: int = 0, rate: float = 0, length: float = 0
) -> Rows:
    """Return the rows of one run; it is evaluated ten times. Where rate or length are tried, others test."""
    about = TARGETS[target]
    config = small(about, length or EPOCHS[pictures], seed)
    config.data.train_split = f"train[:{pictures}]"
    if rate or length:
        config.data.eval_split = VALIDATION
    epochs = config.duration.epochs
    config.batch_size = 16 if pictures == 50 else 32
    config.optim.lr = rate or RATES[method]
    config.eval_every, config.log_every = Duration(epochs=epochs / 10), Duration(steps=10)
    if method != "scratch":
        config.init_from, config.tune.method = str(backbone(about.backbone, work)[0]), method
    if method == "head":
        config.optim.weight_decay = 0.0
    name = f"{pictures}_{method}_{config.optim.lr:g}_{epochs:g}_{'tried' if rate or length else 'test'}_{seed}"
    return rows_of(config, work / target / name)


def figures(rows: Rows, name: str = "top1") -> np.ndarray:
    """Return epochs and a figure of all evaluations, (n, 2)."""
    return np.array([(row["epoch"], row[name]) for row in rows if name in row])


def better(rows: Rows) -> float:
    """Return the better of parameters and moving average at the end, which later commands take."""
    return max(figures(rows, name)[-1, 1] for name in ("top1", "ema_top1"))


def sizes(name: str, work: Path, seeds: int) -> dict[int, dict[str, list[Rows]]]:
    """Return the runs of a target by number of pictures and method, a list over the seeds."""
    found = {size: {method: [] for method in METHODS} for size in TARGETS[name].sizes}
    for seed in range(seeds):
        for size, method in ((size, method) for size in found for method in METHODS):
            found[size][method].append(tuned(name, size, method, work, seed=seed))
    return found


VALIDATION = "train[1000:]"  # of the digits, where rates and lengths are tried
RATES_TRIED = (5e-4, 2e-3, 8e-3, 3.2e-2)
LENGTHS_TRIED = (5, 20, 80)


def rates(work: Path) -> dict[str, list[float]]:
    return {m: [better(tuned("digits", 500, m, work, rate=rate)) for rate in RATES_TRIED] for m in METHODS}


def lengths(work: Path) -> dict[str, list[float]]:
    return {m: [better(tuned("digits", 500, m, work, length=n)) for n in LENGTHS_TRIED] for m in METHODS}


def plain(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(label, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def draw_sizes(runs: dict[str, dict[int, dict[str, list[Rows]]]], path: Path) -> None:
    """Draw top-1 over the number of pictures, a panel a target, with bands from the least to the greatest seed."""
    figure = Figure(figsize=(4 * len(runs), 4), dpi=120, layout="constrained")
    for axes, (name, found) in zip(np.ravel(figure.subplots(1, len(runs))), runs.items(), strict=True):
        for (method, words), colour in zip(METHODS.items(), COLOURS, strict=False):
            values = np.array([[better(rows) for rows in of_size[method]] for of_size in found.values()])
            axes.fill_between([*found], values.min(1), values.max(1), color=colour, alpha=0.2, linewidth=0)
            axes.plot([*found], values.mean(1), color=colour, marker=MARKERS[method], markersize=5, label=words)
        axes.set_xscale("log")
        axes.set_xticks([*found], [f"{size:,}" for size in found])
        axes.minorticks_off()
        plain(axes, f"{name}: top-1 (%)", "pictures to learn from")
    figure.savefig(path, format="png")


def draw_epochs(of_method: dict[str, Rows], path: Path) -> None:
    """Draw the first seed's course on 500 digits: what parameters and moving average find, and the training loss."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (method, words), colour in zip(METHODS.items(), COLOURS, strict=False):
        rows = of_method[method]
        style = {"color": colour, "marker": MARKERS[method], "markersize": 4}
        left.plot(*figures(rows).T, label=words, **style)
        middle.plot(*figures(rows, "ema_top1").T, label=words, linestyle="--", **style)
        losses = figures(rows, "loss")
        right.plot(*losses.T, color=colour, label=words)
    plain(left, "parameters: top-1 (%)", "epoch")
    plain(middle, "their moving average: top-1 (%)", "epoch")
    plain(right, "training loss", "epoch")
    figure.savefig(path, format="png")


def write(parts: list[str], work: Path, seeds: int, out: Path) -> None:
    """Write what the parts found; their runs have ended."""
    report = Report(
        "Fine-tuning with few pictures",
        out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "flax"),
        date=machine.today(),
    )
    report.text(
        "`python benchmarks/small_data.py`: `configs/stamps.py`'s EfficientVMamba (width 16, one block a stage) at 32 "
        "pixels; top-1, per cent, the better of parameters and moving average at the end of each run. The learning "
        "rates were chosen by part `rates`, on digits that are neither learned from nor tested, and hold for all "
        "targets and sizes."
    )
    report.table("the backbones, on pictures like their own", ("top-1", "{:.2f}"))
    for name in ("clothes", "stamps"):
        report.row(f"{name}, trained on all", better(backbone(name, work)[1]))
    of_target = {name: sizes(name, work, seeds) for name in TARGETS if name in parts}
    for name, found in of_target.items():
        about = TARGETS[name]
        report.heading(f"{name[0].upper()}{name[1:]}, from the backbone that knows {about.backbone}")
        runs = "one run each" if seeds == 1 else f"means of {seeds} seeds, and the least and greatest"
        report.text(f"Tested on `{about.test}` of `{about.name}`; {runs}.")
        form = "{:.1f}" if seeds == 1 else "{:.1f} ({:.1f} to {:.1f})"
        report.table(("pictures", "{:,}"), *((words, form) for words in METHODS.values()))
        for size, methods in found.items():
            values = {method: [better(rows) for rows in runs] for method, runs in methods.items()}
            spreads = [[float(np.mean(v)), min(v), max(v)] for v in values.values()]
            report.row(size, *(spread[0] if seeds == 1 else spread for spread in spreads))
    if of_target:
        draw_sizes(of_target, out.with_suffix(".png"))
        report.text(f"![Top-1 by the number of pictures]({out.with_suffix('.png').name})")
    if "digits" in of_target:
        course = out.with_name(f"{out.stem}_epochs.png")
        draw_epochs({method: runs[0] for method, runs in of_target["digits"][500].items()}, course)
        report.heading("The course of a run: 500 digits, the first seed")
        report.text(f"![The course of four runs]({course.name})")
        report.table("share of the run", *((words, "{:.1f}, {:.1f}") for words in METHODS.values()))
        runs = [of_target["digits"][500][method][0] for method in METHODS]
        both = [np.stack([figures(rows)[:, 1], figures(rows, "ema_top1")[:, 1]], 1) for rows in runs]
        for i in range(len(both[0])):
            report.row(f"{(i + 1) / len(both[0]):.0%}", *(pairs[i].tolist() for pairs in both))
        report.text("Each cell: the parameters' top-1, then their moving average's.")
    for part, tried, head, of_method in (
        ("rates", RATES_TRIED, "Learning rates: 500 digits", rates),
        ("length", LENGTHS_TRIED, "How long: epochs with 500 digits", lengths),
    ):
        if part in parts:
            report.heading(head)
            report.table("", *((f"{value:g}", "{:.1f}") for value in tried))
            for method, values in of_method(work).items():
                report.row(METHODS[method], *values)


PARTS = ("backbones", "stamps", "clothes", "digits", "rates", "length")


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way to learn (default 1)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/small_data", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/small_data.json", help="JSON file")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        raise UserError(f"unknown parts {sorted(unknown)}; allowed: {', '.join(PARTS)}")
    jax.config.update("jax_compilation_cache_dir", str(options.work / "compiled"))  # the runs share programs
    done: list[str] = []
    for part in options.parts or PARTS:
        done.append(part)
        write(done, options.work, options.seeds, options.out)


if __name__ == "__main__":
    sys.exit(cli.main(main))
