"""The command ``evmamba``: one table of subcommands, each the same code as ``python -m`` of its module."""

import sys

from evmamba_jax import __version__, cli

# Subcommand: the module with its ``main(argv, prog)``, and what it does.
COMMANDS = {
    "train": ("evmamba_jax.train", "train or evaluate a model, e.g. evmamba train --config digits"),
    "predict": ("evmamba_jax.predict", "say what images show, in words and as a picture"),
    "models": ("evmamba_jax.models.__main__", "list the models: size, published accuracy, source of the weights"),
    "weights": ("evmamba_jax.weights.__main__", "make official weights ours, and ours theirs"),
    "data": ("evmamba_jax.data.__main__", "make a data set ready for training"),
    "preflight": ("evmamba_jax.preflight.__main__", "compile a training step for hardware that is not here"),
    "pruning": ("evmamba_jax.pruning.__main__", "cut pruned channels out of a model"),
    "analysis": (
        "evmamba_jax.analysis.__main__",
        "look inside models: what they see and cost, how fast they are",
    ),
}


def main(argv: list[str] | None = None, prog: str = "evmamba") -> int:
    """Run the subcommand that ``argv`` names; return the exit code, 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    told = {"description": "Vision state-space models in JAX and Flax.", "version": f"evmamba-jax {__version__}"}
    return cli.main(lambda: cli.subcommand(arguments, prog, COMMANDS, **told))


if __name__ == "__main__":
    sys.exit(main(prog="python -m evmamba_jax"))
