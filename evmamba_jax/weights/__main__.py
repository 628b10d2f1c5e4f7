"""Command: ``python -m evmamba_jax.weights convert --model evmamba_t --torch FILE --out DIR``."""

import argparse
import sys

from evmamba_jax.errors import UserError
from evmamba_jax.weights.convert import convert_file


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m evmamba_jax.weights", description="Official weights for our models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="make a checkpoint from a PyTorch or safetensors file")
    command.add_argument("--model", required=True, metavar="NAME", help="model to fill, e.g. evmamba_t")
    command.add_argument("--torch", required=True, metavar="FILE", help=".pth, .pt, .bin or .safetensors file")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the checkpoint, new or empty")
    command.add_argument(
        "--key", metavar="KEY", help="entry of the file to take, e.g. model_ema (default: the weights)"
    )
    args = parser.parse_args(argv)
    try:
        convert_file(args.torch, args.model, args.out, key=args.key)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.model} with the weights of {args.torch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
