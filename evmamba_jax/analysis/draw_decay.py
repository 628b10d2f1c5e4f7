"""Draw decay maps over photographs: one picture, or a page of several layers.

python -m evmamba_jax.analysis decay-map vmamba_t china.jpg --size 512
python -m evmamba_jax.analysis decay-map msvmamba_t --layer stages.3.blocks.1.mixer.scan:low --last
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from evmamba_jax import cli
from evmamba_jax.analysis.activation_maps import check_memory
from evmamba_jax.analysis.decay_maps import FAR, DecayMap, decay_ratio, decays
from evmamba_jax.analysis.map_commands import Maps, add_arguments, run
from evmamba_jax.analysis.scan_pictures import Panel
from evmamba_jax.analysis.scanning import Pixel, Recorded, ScanLayer
from evmamba_jax.errors import UserError


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis decay-map") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Draw how much is left, at one pixel, of what the others wrote into the state of a scan.",
    )
    add_arguments(parser, "decay_map.png")
    parser.add_argument("--last", action="store_true", help="lead to the last token of each walk, not to a pixel")
    return cli.main(lambda: _draw(parser.parse_intermixed_args(argv)))


def _draw(args: argparse.Namespace) -> None:
    if args.last and (args.pixel or args.class_token):
        raise UserError("--last leads to the last token of each walk: leave out --pixel and --class-token")

    def check(layer: ScanLayer, images: int, pixels: int) -> None:
        check_memory(layer, images, pixels, "absolute", args.memory)

    def maps_of(layer: ScanLayer, recorded: Sequence[Recorded], pixels: Sequence[Pixel | str]) -> list[Maps]:
        return [Maps(_panels(decays(layer, recorded, pixel))) for pixel in pixels]

    words = "What is left, exp(sum dt A) to the framed pixel, mean over channels and states"
    run(args, "Decay map", words.replace("framed pixel", "last token") if args.last else words, check, maps_of)


def _panels(found: DecayMap) -> list[Panel]:
    panels = [
        Panel(walk.title, values, walk.order, None if isinstance(end, str) else end)
        for walk, values, end in zip(found.layer.walks, found.walks[0], found.ends, strict=True)
    ]
    if "last" in found.ends:
        return panels
    try:
        ratio = decay_ratio(found)[0]
    except UserError:  # no walks, or no pixels, to compare
        return panels
    rows, columns = found.layer.inside
    ratio = ratio[:rows, :columns]
    share = (ratio[np.isfinite(ratio)] > FAR).mean()
    title = f"rows or columns keep\nover {FAR:g} times more: {share:.0%}"
    return [*panels, Panel(title, (ratio > FAR) * 1.0, None, None)]


if __name__ == "__main__":
    sys.exit(main())
