"""Commands that take weights from the official code and give them back.

``python -m evmamba_jax.weights convert --model evmamba_t --torch FILE --out DIR``
``python -m evmamba_jax.weights export --model evmamba_t --checkpoint DIR --out FILE.safetensors``
"""

import argparse
import ast
import sys
from typing import Any

from evmamba_jax import cli
from evmamba_jax.errors import UserError
from evmamba_jax.weights.convert import convert_file, export_file


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", required=True, metavar="NAME", help="the model, e.g. evmamba_t")
    shared.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the model that differs from the published one, e.g. num_classes=10; may be repeated",
    )
    parser = argparse.ArgumentParser(
        prog="python -m evmamba_jax.weights", description="Official weights for our models, and ours for theirs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser(
        "convert", parents=[shared], help="make a checkpoint from a PyTorch or safetensors file"
    )
    convert.add_argument("--torch", required=True, metavar="FILE", help=".pth, .pt, .bin or .safetensors file")
    convert.add_argument("--out", required=True, metavar="DIR", help="folder for the checkpoint, new or empty")
    convert.add_argument(
        "--key", metavar="KEY", help="entry of the file to take, e.g. model_ema (default: the weights)"
    )
    export = commands.add_parser(
        "export", parents=[shared], help="make a safetensors file for the official code from a checkpoint"
    )
    export.add_argument("--checkpoint", required=True, metavar="DIR", help="converted model, run, or one of its steps")
    export.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file, new")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    options = dict(map(_option, args.option))
    if args.command == "convert":
        convert_file(args.torch, args.model, args.out, key=args.key, **options)
        print(f"{args.out}: {args.model} with the weights of {args.torch}")
    else:
        export_file(args.checkpoint, args.model, args.out, **options)
        print(f"{args.out}: the weights of {args.checkpoint} under the official names")


def _option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value as Python writes it, or else as a word."""
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--option {text!r} must be NAME=VALUE, e.g. num_classes=10")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
