"""What models cost: ``python -m evmamba_jax.analysis flops NAME ... [--image-size SIDE | HEIGHT WIDTH]``."""

import argparse

from evmamba_jax import cli
from evmamba_jax.counting import count_flops, count_parameters, flops_by_operation, xla_flops
from evmamba_jax.errors import UserError
from evmamba_jax.models.registry import VARIANTS, input_size

_OPERATIONS = ("products", "convolutions", "scans", "attention")


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis flops") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Parameters, multiply-adds of one image by operation, and XLA's own count, in units of 1e6.",
    )
    parser.add_argument("models", nargs="+", metavar="NAME", help="e.g. vmamba_t")
    parser.add_argument(
        "--image-size", nargs="+", type=int, metavar="N", help="side, or height and width (default: the card's)"
    )
    return cli.main(lambda: _print_figures(parser.parse_args(argv)))


def _print_figures(args: argparse.Namespace) -> None:
    if args.image_size and len(args.image_size) > 2:
        raise UserError(f"--image-size takes a side, or height and width; got {len(args.image_size)} numbers")
    titles = ("parameters", "FLOPs", "published", *_OPERATIONS, "XLA's count")
    print(f"{'model':<18}", *(f"{title:>12}" for title in titles))
    for name in args.models:
        figures = _figures(name, args.image_size)
        print(f"{name:<18}", *(f"{'' if n is None else format(n / 1e6, ',.1f'):>12}" for n in figures), flush=True)


def _figures(name: str, image_size: list[int] | None) -> list[float | None]:
    own = input_size(name)
    height, width = (image_size[0], image_size[-1]) if image_size else own
    card = VARIANTS[name].card
    flops = flops_by_operation(name, (height, width))
    return [
        count_parameters(name),
        count_flops(name, (height, width)),
        card.published_flops if card and (height, width) == own else None,
        *(flops.get(operation, 0) for operation in _OPERATIONS),
        xla_flops(name, (height, width)),
    ]
