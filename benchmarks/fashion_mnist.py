"""Fashion-MNIST: our EfficientVMamba and the official PyTorch modules, trained by one recipe on equal data.

    apt-get install dataset-fashion-mnist
    git clone https://github.com/TerryPei/EfficientVMamba
    pip install torch
    python benchmarks/fashion_mnist.py --official EfficientVMamba [--seeds 3] [--work DIR] [--out FILE]
        [--config.NAME=VALUE ...]

Ours is trained by ``train_tpu.py --config configs/fashion_mnist.py``, the official model by
``fashion_mnist_official.py``, which also says what is shared. Before that, it shows that both are the same model under
the same recipe. One run follows the other; each that has ended is kept in the work folder, and the results are written
anew after each, so the command can be stopped and started again. An override holds for both sides.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from evmamba_jax.data.sources import open_source
from evmamba_jax.measuring.document import Report
from evmamba_jax.reports.drawing import BLUE, GREY, ORANGE
from evmamba_jax.reports.writer import METRICS, read_rows
from evmamba_jax.training import Config, parse_command

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs/fashion_mnist.py")
SIDES = {"ours": ("ours (JAX)", BLUE), "official": ("official (PyTorch)", ORANGE)}
Rows = list[dict[str, float]]


def start(script: str, *arguments: str) -> None:
    """Run a command of the repository with the same Python; its lines go to this one's output."""
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def series(runs: list[Rows], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs (n,) and a figure (runs, n)."""
    points = [[(row["epoch"], row[name]) for row in rows if name in row] for rows in runs]
    return np.array(points[0])[:, 0], np.array(points)[:, :, 1]


def draw(runs: dict[str, list[Rows]], path: Path) -> None:
    """Draw the means of both sides over the epochs, with bands from the least to the greatest seed."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    panels = {
        "top1": "top-1 on the 10000 test images (%)",
        "eval_loss": "loss on the test images",
        "loss": "training loss",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for side, (label, colour) in SIDES.items():
            epochs, values = series(runs[side], name)
            marker = "" if name == "loss" else "o" if side == "ours" else "s"
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(epochs, values.mean(0), color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch", color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    figure.savefig(path, format="png")


def spread(values: np.ndarray) -> float | list[float]:
    """Return mean and, where there are several, standard deviation."""
    return float(values[0]) if len(values) == 1 else [float(values.mean()), float(values.std(ddof=1))]


def verdict(ours: np.ndarray, official: np.ndarray) -> str:
    """Return what the last accuracies (seeds,) of both sides say."""
    n = len(ours)
    difference = ours.mean() - official.mean()
    error = ((ours.var(ddof=1) + official.var(ddof=1)) / n) ** 0.5
    test = stats.ttest_ind(ours, official, equal_var=False)
    low, high = test.confidence_interval(0.95)
    beyond = "beyond" if low > 0 or high < 0 else "within"
    return (
        f"Ours minus official: {difference:+.2f} points with a standard error of {error:.2f}, that is "
        f"{difference / error:+.1f} standard errors; Welch's test gives p = {test.pvalue:.2f} and a 95 % interval of "
        f"{low:+.2f} to {high:+.2f}. The difference is {beyond} the noise of the seeds.\n\n"
        f"{n} seeds a side are few: a true difference smaller than about {(high - low) / 2:.1f} points, half of that "
        "interval, would not have been told from none."
    )


def write(check: dict, runs: dict[str, list[Rows]], config: Config, examples: int, flags: list[str], out: Path) -> None:
    """Write the results of the seeds that both sides have ended."""
    batch = config.batch_size
    seeds = len(runs["ours"])
    curves = {side: series(rows, "top1") for side, rows in runs.items()}
    epochs, _ = curves["ours"]
    last = {side: values[:, -1] for side, (_, values) in curves.items()}
    losses = {side: series(rows, "eval_loss")[1][:, -1] for side, rows in runs.items()}
    names = [label for label, _ in SIDES.values()]
    mean = "{:.2f}" if seeds == 1 else "{:.2f} ± {:.2f}"
    report = Report("Fashion-MNIST, ours and the official code", out, **check["environment"])
    report.text(
        f"`{' '.join(['python benchmarks/fashion_mnist.py --official EfficientVMamba', *flags])}`, with "
        "TerryPei/EfficientVMamba at the commit that `evmamba_jax/models/efficientvmamba.py` names."
    )
    report.text(
        f"One recipe, `configs/fashion_mnist.py`: EfficientVMamba of width {config.model.options['width']}, one block "
        f"a stage, {check['parameters']} parameters, float32; {config.duration.epochs:g} epochs of the {examples} "
        f"training images in batches of {batch}. Both sides see the same arrays in the same order and the same "
        "learning rate at every step; each has its own initial values and drop path, and its own framework's AdamW "
        "and clipping. The official modules run unchanged but for the CUDA kernel of the scan, in whose place "
        "`benchmarks/fashion_mnist_official.py` puts its formulas."
    )
    report.heading("The same model and recipe")
    report.table("from equal weights", ("largest difference", "{:.1e}"))
    report.row("the scan in PyTorch against `pallas_kernels`, output and gradients, relative", check["scan"])
    after = f"logits of {batch} test images after {check['steps']} steps, weights through `to_torch`"
    report.row(after, check["logits"])
    report.row(f"loss in each of {check['steps']} steps of training, both sides on their own", check["loss"])
    report.row("norm of the gradient in them, relative", check["grad_norm"])
    report.row("weights and running statistics after them, of all tensors the worst, relative", check["weights"])
    report.text(
        "In float64 and without drop path; all else is the recipe's, and a weight in the wrong group would end 6e-5 "
        "apart. What differs is that our rates and our AdamW's correction of bias are float32. Relative: over the "
        "largest value of the tensor."
    )
    report.heading("Accuracy")
    report.text(f"![Both curves]({out.with_suffix('.png').name})")
    report.text(f"Top-1 on the 10000 test images, per cent: mean and standard deviation over {seeds} seeds.")
    report.table(("epoch", "{:.3f}"), *((name, mean) for name in names))
    for i, epoch in enumerate(epochs):
        report.row(float(epoch), *(spread(curves[side][1][:, i]) for side in SIDES))
    report.table("top-1 at the end", *((f"seed {seed}", "{:.2f}") for seed in range(seeds)), ("mean", mean))
    for side, (label, _) in SIDES.items():
        report.row(label, *map(float, last[side]), spread(last[side]))
    report.table("loss at the end", *((f"seed {seed}", "{:.4f}") for seed in range(seeds)), ("mean", "{:.4f}"))
    for side, (label, _) in SIDES.items():
        report.row(label, *map(float, losses[side]), float(losses[side].mean()))
    if seeds > 1:
        report.text(verdict(last["ours"], last["official"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="a clone of TerryPei/EfficientVMamba")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--work", type=Path, default=Path("runs/fashion_mnist"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fashion_mnist.json", help="JSON file")
    options, extra = parser.parse_known_args()
    recipe = [f"--config={CONFIG}", *extra]
    config, _ = parse_command([sys.argv[0], *recipe])
    examples = len(open_source(config.data, config.data.train_split))
    total = config.duration.in_steps(examples // config.batch_size)
    os.environ["JAX_PLATFORMS"] = "cpu"
    peer = "benchmarks/fashion_mnist_official.py", str(options.official)
    if not (options.work / "check.json").exists():
        start(*peer, "check", *recipe, f"--workdir={options.work}")
    check = json.loads((options.work / "check.json").read_text())
    commands = {"ours": ("train_tpu.py",), "official": (*peer, "train")}
    runs: dict[str, list[Rows]] = {side: [] for side in SIDES}
    for seed in range(options.seeds):
        for side, command in commands.items():
            folder = options.work / f"{side}_{seed}"
            rows = read_rows(folder / METRICS)
            if not rows or rows[-1]["step"] < total or "top1" not in rows[-1]:
                start(*command, *recipe, f"--config.seed={seed}", f"--workdir={folder}")
                rows = read_rows(folder / METRICS)
            runs[side].append(rows)
        write(check, runs, config, examples, extra, options.out)
        draw(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
