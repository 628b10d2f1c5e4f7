"""The command ``evmamba``: one table of subcommands, each the same code as ``python -m`` of its module."""

import argparse
import importlib
import sys

from evmamba_jax import __version__, cli
from evmamba_jax.errors import UserError, nearest

# Subcommand: the module with its ``main(argv, prog)``, and what it does.
COMMANDS = {
    "train": ("evmamba_jax.train", "train or evaluate a model, e.g. evmamba train --config digits"),
    "predict": ("evmamba_jax.predict", "say what images show, in words and as a picture"),
    "models": ("evmamba_jax.models.__main__", "list the models: size, published accuracy, source of the weights"),
    "weights": ("evmamba_jax.weights.__main__", "make official weights ours, and ours theirs"),
    "data": ("evmamba_jax.data.__main__", "make a data set ready for training"),
    "preflight": ("evmamba_jax.preflight.__main__", "compile a training step for hardware that is not here"),
    "pruning": ("evmamba_jax.pruning.__main__", "cut pruned channels out of a model"),
    "analysis": ("evmamba_jax.analysis.__main__", "count what models cost, by operation"),
}


def main(argv: list[str] | None = None, prog: str = "evmamba") -> int:
    """Run the subcommand that ``argv`` names; return the exit code, 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    return cli.main(lambda: _run(arguments, prog))


def _run(argv: list[str], prog: str) -> int:
    if argv and argv[0] in COMMANDS:
        module, _ = COMMANDS[argv[0]]
        return importlib.import_module(module).main(argv[1:], prog=f"{prog} {argv[0]}")
    listed = "\n".join(f"  {name:<12}{does}" for name, (_, does) in COMMANDS.items())
    parser = cli.Parser(
        prog=prog,
        usage="%(prog)s COMMAND ...",
        description="Vision state-space models in JAX and Flax.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listed}\n\n{prog} COMMAND --help says more of each.",
    )
    parser.add_argument("--version", action="version", version=f"evmamba-jax {__version__}")
    _, rest = parser.parse_known_args(argv)
    if rest:
        known = ", ".join(COMMANDS)
        raise UserError(f"unknown command {rest[0]!r}{nearest(rest[0], COMMANDS)}; allowed: {known}")
    parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main(prog="python -m evmamba_jax"))
