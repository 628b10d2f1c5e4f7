"""Look inside models: ``python -m evmamba_jax.analysis COMMAND ...``; alone, it lists the commands."""

import sys

from evmamba_jax import cli
from evmamba_jax.models.registry import VARIANTS

# Command: the module with its ``main(argv, prog)``, and what it does.
COMMANDS = {
    "flops": ("evmamba_jax.analysis.flops", "count parameters and multiply-adds, by operation"),
    "scans": ("evmamba_jax.analysis.scans", "list the layers of a model that scan"),
    "activation-map": ("evmamba_jax.analysis.draw_activation", "draw with which weights pixels enter a scan's result"),
    "decay-map": ("evmamba_jax.analysis.draw_decay", "draw how far the states of a scan remember"),
    "receptive-field": ("evmamba_jax.analysis.receptive_field", "draw what the middle of a map sees of the image"),
    "grad-cam": ("evmamba_jax.analysis.gradcam", "draw where in images a model finds what speaks for a class"),
    "throughput": (
        "evmamba_jax.analysis.speed_table",
        "measure images a second, latency, memory; beside peers, in turns",
    ),
    "embeddings": ("evmamba_jax.analysis.embeddings", "features of pictures, and accuracies of neighbours and a probe"),
    "errors": ("evmamba_jax.analysis.errors", "what goes wrong in a detector or segmenter, by kind and size"),
    "stages": ("evmamba_jax.analysis.stages", "which stage and level fires where, and where boxes come from"),
    "compare": ("evmamba_jax.analysis.compare", "two models on the same images: what only one of them gets right"),
}


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis") -> int:
    """Run the command that ``argv`` names; return the exit code, 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in VARIANTS:  # as it was when there was one command
        arguments = ["flops", *arguments]
    return cli.main(lambda: cli.subcommand(arguments, prog, COMMANDS, description="Look inside models."))


if __name__ == "__main__":
    sys.exit(main())
