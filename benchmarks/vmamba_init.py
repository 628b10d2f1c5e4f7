"""Whether training is robust to initial values and activation, as VMamba's tables 11 and 15 have it: on Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python benchmarks/vmamba_init.py [--seeds 3] [--work DIR] [--out FILE]

Every variant of ``configs/experiments/vmamba_init.py`` that differs from the published one in one thing, for so many
seeds; a seed of them all takes some minutes. Each run that has ended is kept in the work folder, and the results are
written anew after each seed, so the command can be stopped and started again.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from lib.runs import Rows, rows_of
from matplotlib.figure import Figure

from configs.experiments import vmamba_init
from evmamba_jax import cli
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.reports.drawing import COLOURS, GREY

ROOT = Path(__file__).parent.parent
VARIANTS = {  # and top-1 of VMamba-T on ImageNet in the paper's tables 11 and 15
    "mamba_silu": ("Mamba's initial values, SiLU", 82.60),
    "random_silu": ("random initial values", 82.58),
    "zero_silu": ("zero initial values", 82.67),
    "mamba_gelu": ("GELU", 82.53),
    "mamba_relu": ("ReLU", 82.65),
}


def last(rows: Rows) -> float:
    return [row["top1"] for row in rows if "top1" in row][-1]


def write(runs: dict[str, list[Rows]], out: Path) -> None:
    """Write the table and the picture of the seeds that have ended."""
    seeds = len(runs["mamba_silu"])
    found = {name: np.array([last(rows) for rows in of_seed]) for name, of_seed in runs.items()}
    report = Report(
        "VMamba's initial values and activations on Fashion-MNIST",
        out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "flax"),
        date=machine.today(),
    )
    report.text(
        "`python benchmarks/vmamba_init.py`: a VMamba of width 16, one block a stage, 1 epoch of the 60000 training "
        f"images in batches of 128; top-1 on the 10000 test images, per cent, {seeds} seeds."
    )
    report.text(f"![Losses]({out.with_suffix('.png').name})")
    columns = [(f"seed {seed}", "{:.2f}") for seed in range(seeds)]
    report.table(
        "variant", *columns, ("mean", "{:.2f}"), ("less the first, mean", "{:+.2f}"), ("paper, ImageNet", "{:.2f}")
    )
    for name, (words, published) in VARIANTS.items():
        difference = (found[name] - found["mamba_silu"]).mean()
        report.row(words, *map(float, found[name]), float(found[name].mean()), float(difference), published)
    draw(runs, out.with_suffix(".png"))


def draw(runs: dict[str, list[Rows]], path: Path) -> None:
    """Draw the training losses, means over the seeds; each variant has a dash of its own."""
    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    dashes = ("-", "--", ":", "-.", (0, (1, 3)))
    for (name, of_seed), colour, dash in zip(runs.items(), COLOURS, dashes, strict=True):
        losses = np.array([[row["loss"] for row in rows if "loss" in row] for rows in of_seed])
        steps = [row["step"] for row in of_seed[0] if "loss" in row]
        axes.plot(steps, losses.mean(0), color=colour, linestyle=dash, linewidth=1.6, label=VARIANTS[name][0])
    axes.set_title("training loss, mean over the seeds", loc="left", fontsize=11)
    axes.set_xlabel("step", color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/vmamba_init", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/vmamba_init.json", help="JSON file")
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.work / "compiled"))  # the seeds share their programs
    runs: dict[str, list[Rows]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):
        for name in VARIANTS:
            config = vmamba_init.get_config(name)
            config.seed = seed
            runs[name].append(rows_of(config, options.work / f"{name}_{seed}"))
        write(runs, options.out)


if __name__ == "__main__":
    sys.exit(cli.main(main))
