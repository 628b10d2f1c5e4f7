"""Train or evaluate a vision state-space model.

    python -m evmamba_jax.train --config digits
    python -m evmamba_jax.train --config evmamba_t:paper --config.optim.lr=1e-3

``evmamba train`` and, in a clone, ``train_tpu.py`` are the same.
"""

import argparse
import os
import platform
import sys

from evmamba_jax import cli, packaged

_HELP = {"-h", "--help", "-help"}
_TUNABLES, _LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_GLIBC = 2, 35  # the first that knows them


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.train") -> int:
    """Run the command with ``argv``; return the exit code: 0, 2 for a user's mistake, 128 + signal after one."""
    arguments = sys.argv[1:] if argv is None else argv
    return cli.main(lambda: _train(arguments, prog))


def _train(argv: list[str], prog: str) -> int | None:
    wants_help = _HELP & set(argv)
    rest = [argument for argument in argv if argument not in _HELP]
    if wants_help or not argv:
        _parser(prog).print_help()
        if not rest:
            return 0 if wants_help else 2
    if not wants_help:
        _take_large_pages(argv)
    from evmamba_jax.training import parse_command, run
    from evmamba_jax.training.command import settings

    config, workdir = parse_command([prog, *rest])
    if wants_help:
        print("\nkeys, with their values here:", *settings(config), sep="\n  ")
    else:
        run(config, workdir)


def _take_large_pages(argv: list[str]) -> None:
    """Start this command anew where that lets large arrays have large pages.

    A step on a CPU makes and drops hundreds of megabytes. In pages of 4 kB a third of its processor time went to them;
    with large ones it took a fifth less time. glibc reads the setting when a process starts, and only then.
    """
    kind, version = platform.libc_ver()
    own = "jax" not in sys.modules and sys.argv[-len(argv) :] == argv  # this process is the command, and nothing else
    if not (own and sys.executable and kind == "glibc" and _TUNABLES not in os.environ):
        return
    if tuple(map(int, version.split("."))) >= _GLIBC:
        environment = {**os.environ, _TUNABLES: _LARGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser that writes the help; absl's flags, which know every key of a config, do the reading."""
    parser = cli.Parser(
        prog=prog,
        usage="%(prog)s --config NAME|FILE[:VARIANT] [--config.KEY=VALUE ...] [--workdir DIR]",
        description="Train or evaluate a vision state-space model; started again, a run continues where it was.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=packaged.help_text(),
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="where everything is written (default: runs/NAME_OF_THE_CONFIG)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
