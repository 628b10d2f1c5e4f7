"""The ten experiments beside their baselines, one recipe, several seeds: on Fashion-MNIST, with small models.

    apt-get install dataset-fashion-mnist
    python benchmarks/experiments.py [--seeds 3] [--work DIR] [--out FILE]

Each row and seed, of iterative pruning each level, is a run of about a minute on two cores, the whole a little under an
hour. A run that has ended is kept in the work folder and is not run again; the results are written anew after each
seed, so the command can be stopped and started again.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lib.runs import rows_of
from matplotlib.figure import Figure

from configs.experiments import (
    attention_pool,
    baseline,
    convnext,
    early_bird,
    imp,
    mambavision,
    mobilenet,
    prune_cosine,
    prune_gradient,
    s4d,
    s5,
    sliding_window,
    squeeze_excite,
)
from evmamba_jax import cli, pruning
from evmamba_jax.analysis import count_flops, count_parameters
from evmamba_jax.arrays import split
from evmamba_jax.checkpoints import find
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.reports.drawing import BLUE, COLOURS, GREY, ORANGE
from evmamba_jax.reports.sparsity import SPARSITY
from evmamba_jax.reports.tickets import read_tickets
from evmamba_jax.reports.writer import SPEED, read_rows
from evmamba_jax.training.config import Config
from evmamba_jax.weights.load import open_place

ROOT = Path(__file__).parent.parent
LEVELS, RATE = 2, 0.5  # of iterative pruning: a half and a quarter of the weights are left


class Row(NamedTuple):
    """A row of the table: the experiment's number, what it varies, which model, its config, and its baseline."""

    number: str
    words: str
    model: str
    module: Any
    variant: str = "fashion"
    beside: str = "baseline"


ROWS = {
    "baseline": Row("", "nothing", "Vim", baseline),
    "squeeze_excite": Row("1", "squeeze-and-excitation", "Vim", squeeze_excite),
    "mobilenet": Row("2", "inverted residual", "Vim", mobilenet),
    "prune_cosine": Row("3", "pruned along a cosine", "Vim", prune_cosine),
    "early_bird": Row("5", "early bird, channels", "Vim", early_bird),
    "prune_gradient": Row("6", "pruned by gradients", "Vim", prune_gradient),
    "course": Row("", "nothing", "course Vim", baseline, "course_fashion", "course"),
    "course_squeeze_excite": Row(
        "1", "squeeze-and-excitation", "course Vim", squeeze_excite, "course_fashion", "course"
    ),
    "course_mobilenet": Row("2", "inverted residual", "course Vim", mobilenet, "course_fashion", "course"),
    "mambavision": Row("", "nothing", "MambaVision", mambavision, beside="mambavision"),
    "sliding_window": Row("7", "sliding-window attention", "MambaVision", sliding_window, beside="mambavision"),
    "s4d": Row("8", "S4D", "MambaVision", s4d, beside="mambavision"),
    "s5": Row("8", "S5", "MambaVision", s5, beside="mambavision"),
    "attention_pool": Row("9", "attention pooling", "MambaVision", attention_pool, beside="mambavision"),
    "convnext": Row("10", "ConvNeXt's block and stem", "MambaVision", convnext, beside="mambavision"),
}
TICKETS = Row("4", "iterative pruning", "Vim", imp)


class Found(NamedTuple):
    """What a run found.

    Attributes:
        best: top-1 of its best evaluation, per cent.
        last: of its last.
        seconds: of its training steps.
        parameters: that are left; of a model whose channels were pruned, once they are cut out.
        operations: multiply-adds, of the same model.
        sparsity: zeros among the candidates and among everything, per cent; None in a dense run.
    """

    best: float
    last: float
    seconds: float
    parameters: int
    operations: int
    sparsity: tuple[float, float] | None


def found_in(folder: Path, rows: list[dict[str, float]]) -> Found:
    """Read what a run left in its folder."""
    top1 = [row["top1"] for row in rows if "top1" in row]
    steps = [(row["step"], row["images_per_second"]) for row in read_rows(folder / SPEED) if "images_per_second" in row]
    begins = [0, *(step for step, _ in steps[:-1])]
    model, about = open_place(folder).model, find(folder).meta["config"]
    images = about["batch_size"]
    seconds = sum((step - begin) * images / speed for begin, (step, speed) in zip(begins, steps, strict=True))
    if about["pruning"]["structure"] == "channels":
        model = pruning.cut(model, pruning.zero_channels(split(model).params, pruning.channels(model)))
    sparsity = None
    if (folder / SPARSITY).exists():
        with (folder / SPARSITY).open(newline="") as file:
            candidates, everything = (100 * float(row["sparsity"]) for row in list(csv.DictReader(file))[-2:])
        sparsity = candidates, everything
    return Found(
        max(top1), top1[-1], seconds, count_parameters(model), count_flops(model, about["data"]["image_size"]), sparsity
    )


def configured(row: Row, seed: int) -> Config:
    """Return the configuration of a row."""
    config = row.module.get_config(row.variant)
    config.seed = seed
    return config


def lottery(seed: int) -> Config:
    """Return the configuration of iterative pruning, with fewer levels."""
    config = configured(TICKETS, seed)
    config.pruning.levels, config.pruning.rate = LEVELS, RATE
    return config


def spread(values: list[float]) -> list[float]:
    """Return mean and standard deviation of the seeds."""
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0]


def write(found: dict[str, list[Found]], tickets: list[Any], out: Path) -> None:
    """Write the tables and the picture of the seeds that have ended."""
    seeds = len(tickets)
    report = Report(
        "The ten experiments on Fashion-MNIST",
        out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "flax"),
        date=machine.today(),
    )
    about = configured(ROWS["baseline"], 0)
    images = round(about.duration.epochs * 60000)
    report.text(
        f"`python benchmarks/experiments.py`: {images} training images once, in batches of {about.batch_size}, one "
        f"recipe for all rows, {seeds} seeds: mean ± standard deviation. Top-1 on the 10000 test images, per cent, of "
        "the last evaluation and of the better of two. Seconds are of the training steps alone. The difference is the "
        "mean over the seeds of a row less its baseline, the same model with nothing varied. Vim is Vim in small, "
        "course Vim the course's own model, which is not Vim."
    )
    report.text(f"![Differences from the baselines]({out.with_suffix('.png').name})")
    pair = "{:.2f} ± {:.2f}"
    report.table(
        "experiment",
        "varied",
        "model",
        ("parameters", "{:,}"),
        ("multiply-adds", "{:,}"),
        ("seconds", "{:.0f}"),
        ("best", pair),
        ("last", pair),
        ("difference", pair),
        ("zeros of candidates (%)", "{:.1f}"),
        ("of everything (%)", "{:.1f}"),
    )
    for name, row in ROWS.items():
        own, base = found[name], found[row.beside]
        report.row(
            row.number,
            row.words,
            row.model,
            round(np.mean([one.parameters for one in own])),
            round(np.mean([one.operations for one in own])),
            float(np.mean([one.seconds for one in own])),
            spread([one.best for one in own]),
            spread([one.last for one in own]),
            spread([a.last - b.last for a, b in zip(own, base, strict=True)]) if row.beside != name else None,
            *(np.mean([one.sparsity for one in own], 0).tolist() if own[0].sparsity else (None, None)),
        )
    report.heading("Experiment 4: iterative pruning of Vim")
    report.text(
        f"Levels of {100 * RATE:.0f} % of the weights that are left, all arrays together, rewound to the dense run's "
        "state after 2 % of it; beside each as many weights of every array chosen by chance. The barrier is how far "
        "the test loss rises on the line from the level before."
    )
    report.table(
        ("level", "{:d}"),
        "masks",
        ("weights left (%)", "{:.1f}"),
        ("last", pair),
        ("difference", pair),
        ("barrier", pair),
    )
    for places in zip(*tickets, strict=True):
        first = places[0]
        report.row(
            first.level,
            first.control or ("by magnitude" if first.level else "none"),
            100 * first.density,
            spread([one.figure for one in places]),
            spread([one.figure - own[0].figure for one, own in zip(places, tickets, strict=True)])
            if first.level
            else None,
            spread([one.barrier for one in places]) if first.level and not first.control else None,
        )
    draw(found, tickets, out.with_suffix(".png"))


def draw(found: dict[str, list[Found]], tickets: list[Any], path: Path) -> None:
    """Draw each row's difference from its baseline, a dot a seed, and the tickets."""
    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    differences, levels = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [name for name, row in ROWS.items() if row.beside != name]
    for place, name in enumerate(names):
        own, base = found[name], found[ROWS[name].beside]
        values = [a.last - b.last for a, b in zip(own, base, strict=True)]
        differences.plot(values, [place] * len(values), "o", color=BLUE, alpha=0.5, markersize=5)
        differences.plot(np.mean(values), place, "|", color=ORANGE, markersize=14, markeredgewidth=2)
    differences.axvline(0, color=GREY, linewidth=0.8)
    differences.set_yticks(range(len(names)), [f"{ROWS[name].words} ({ROWS[name].model})" for name in names])
    differences.invert_yaxis()
    differences.set_title("top-1 minus the baseline's top-1: seeds and mean", loc="left", fontsize=11)
    for control, words, colour in (("", "by magnitude", COLOURS[0]), ("random", "by chance", COLOURS[1])):
        chosen = [[t for t in own if t.level == 0 or t.control == control] for own in tickets]
        shares = [100 * t.density for t in chosen[0]]
        for own in chosen:
            levels.plot(shares, [t.figure for t in own], "o", color=colour, alpha=0.4, markersize=4)
        levels.plot(shares, np.mean([[t.figure for t in own] for own in chosen], 0), color=colour, label=words)
    levels.set_xlim(103, 18)
    levels.set_xlabel("weights left (%)", color=GREY)
    levels.set_title("experiment 4: top-1 by level", loc="left", fontsize=11)
    levels.legend(frameon=False)
    for axes in (differences, levels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default 3)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/experiments", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/experiments.json", help="JSON file")
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.work / "compiled"))  # the seeds share their programs
    found: dict[str, list[Found]] = {name: [] for name in ROWS}
    tickets = []
    for seed in range(options.seeds):
        for name, row in ROWS.items():
            folder = options.work / f"{name}_{seed}"
            rows = rows_of(configured(row, seed), folder)
            found[name].append(found_in(folder, rows))
        folder = options.work / f"imp_{seed}"
        rows_of(lottery(seed), folder)
        tickets.append(read_tickets(folder))
        write(found, tickets, options.out)


if __name__ == "__main__":
    sys.exit(cli.main(main))
