"""The layers of a model that scan: ``python -m evmamba_jax.analysis scans MODEL [--size SIDE]``."""

import argparse
import sys

from evmamba_jax import cli
from evmamba_jax.analysis.scanning import scan_layers
from evmamba_jax.analysis.subjects import MODEL_HELP, open_subject


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis scans") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(prog=prog, description="List the layers of a model that scan, as activation-map takes them.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--size", type=int, metavar="SIDE", help="of the images in pixels (default: the model's own)")
    return cli.main(lambda: _list(parser.parse_args(argv)))


def _list(args: argparse.Namespace) -> None:
    subject = open_subject(args.model, image_size=args.size)
    layers = scan_layers(subject.model, subject.data.image_size)
    longest = max(len(layer.name) for layer in layers)
    print(f"{'':>3}  {'layer':<{longest}}  {'map':>9}  channels  states  walks")
    for number, layer in enumerate(layers):
        size = f"{layer.inside[0]}x{layer.inside[1]}"
        walks = "; ".join(walk.title for walk in layer.walks)
        print(f"{number:>3}  {layer.name:<{longest}}  {size:>9}  {layer.channels:>8}  {layer.states:>6}  {walks}")


if __name__ == "__main__":
    sys.exit(main())
