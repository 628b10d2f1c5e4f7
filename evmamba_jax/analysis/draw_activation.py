"""Draw activation maps over photographs: one picture, or a page of several layers.

python -m evmamba_jax.analysis activation-map vmamba_t china.jpg --layer 7 --pixel 100 60
python -m evmamba_jax.analysis activation-map vmamba_t --layer 3 --layer -1 --pixel 100 60 --pixel 180 90 --page a.html
"""

import argparse
import sys
from collections.abc import Sequence

from evmamba_jax import cli
from evmamba_jax.analysis.activation_maps import WEIGHTS, ActivationMap, Channels, check_memory, unrolled
from evmamba_jax.analysis.map_commands import Maps, add_arguments, run
from evmamba_jax.analysis.scan_pictures import Panel
from evmamba_jax.analysis.scanning import Pixel, Recorded, ScanLayer
from evmamba_jax.errors import one_of


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis activation-map") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Draw with which weights the pixels of a map enter the result of a scan at chosen ones.",
    )
    add_arguments(parser, "activation_map.png")
    parser.add_argument("--signed", action="store_true", help="the mean over channels of weights, not of their sizes")
    parser.add_argument("--weights", default="exact", help="exact (default), or VMamba's CB, CwBw or CwBdtw")
    return cli.main(lambda: _draw(parser.parse_intermixed_args(argv)))


def _draw(args: argparse.Namespace) -> None:
    one_of("--weights", args.weights, WEIGHTS)
    channels: Channels = "mean" if args.signed else "absolute"

    def check(layer: ScanLayer, images: int, pixels: int) -> None:
        check_memory(layer, images, pixels, channels, args.memory)

    def maps_of(layer: ScanLayer, recorded: Sequence[Recorded], pixels: Sequence[Pixel]) -> list[Maps]:
        found = unrolled(layer, recorded, pixels, weights=args.weights, channels=channels)
        return [_maps(found, p) for p in range(len(pixels))]

    kind = "" if args.weights == "exact" else f", {args.weights} as in VMamba's figures"
    words = "Mean over channels of the weights" if args.signed else "Mean over channels of the absolute weights"
    run(args, "Activation map", f"{words}{kind}; each line has its own scale", check, maps_of)


def _maps(found: ActivationMap, p: int) -> Maps:
    """Return the maps of one image and pixel p."""
    pixel = found.pixels[p]
    framed = None if pixel == "class" else pixel
    walks = zip(found.layer.walks, found.walks[0, p], strict=True)
    panels = [Panel(walk.title, values, walk.order, framed) for walk, values in walks]
    if len(panels) > 1:
        panels.append(Panel("all walks", found.merged[0, p], None, framed))
    note = "" if found.class_merged is None else f"; weight of the class token: {found.class_merged[0, p]:.2g}"
    return Maps(panels, note)


if __name__ == "__main__":
    sys.exit(main())
