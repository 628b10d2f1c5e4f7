"""What the commands for maps of scans share: their options, and the way from photographs to a picture or a page."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evmamba_jax import cli
from evmamba_jax.analysis.scan_pictures import Line, Panel, Sheet, draw_sheets
from evmamba_jax.analysis.scanning import Pixel, Recorded, ScanLayer, find_layer, record, scan_layers
from evmamba_jax.analysis.subjects import IMAGES_HELP, MODEL_HELP, open_subject, photographs, png, views
from evmamba_jax.data.device import normalize
from evmamba_jax.errors import UserError
from evmamba_jax.reports import page

_MOST_LINES = 150  # in a picture
_LINES_A_PICTURE = 10  # of a page
_IN_WORDS = {"class": "class token", "last": "last token"}


class Maps(NamedTuple):
    """The maps of one image and one pixel, and what else there is to say of them."""

    panels: Sequence[Panel]
    note: str = ""


# From a layer, what was recorded of it for one image, and pixels of its map to the maps of each pixel.
MapsOf = Callable[[ScanLayer, Sequence[Recorded], Sequence[Pixel]], Sequence[Maps]]


def add_arguments(parser: cli.Parser, out: str) -> None:
    """Add the options of a command that draws maps, by default into the file ``out``."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=IMAGES_HELP)
    parser.add_argument(
        "--layer",
        action="append",
        metavar="LAYER",
        help="name or number, as the command 'scans' lists them (default: the last); several are drawn one below the "
        "other",
    )
    parser.add_argument(
        "--pixel",
        action="append",
        nargs=2,
        type=int,
        metavar=("ROW", "COLUMN"),
        help="of the image that the model sees, from 0 (default: its centre); several are drawn one below the other",
    )
    parser.add_argument(
        "--class-token", action="store_true", help="Vim's class token, after the pixels if there are any"
    )
    parser.add_argument("--size", type=int, metavar="SIDE", help="of the images in pixels (default: the model's own)")
    parser.add_argument("--memory", type=float, default=2.0, metavar="GIB", help="that a map may take (default: 2)")
    parser.add_argument("--out", type=png, metavar="PNG", help=f"the picture (default: {out}, or none with --page)")
    parser.add_argument("--page", type=_html, metavar="HTML", help="one page with the pictures inside, a part a layer")
    parser.set_defaults(default_out=Path(out))


def run(
    args: argparse.Namespace,
    title: str,
    words: str,
    check: Callable[[ScanLayer, int, int], None],
    maps_of: MapsOf,
) -> None:
    """Draw the maps that a command line asks for.

    Args:
        args: of :func:`add_arguments`.
        title: of a page.
        words: what the values of the maps are.
        check: raises a UserError where a layer, so many images and so many pixels take too much memory.
        maps_of: computes the maps.

    Raises:
        UserError: what cannot be opened, found or held in memory.
    """
    subject = open_subject(args.model, image_size=args.size)
    side = subject.data.image_size
    every = scan_layers(subject.model, side)
    layers = [find_layer(every, given) for given in args.layer or ["-1"]]
    places: list[Any] = [_checked(row, column, side) for row, column in args.pixel or ()]
    places += ["class"] * args.class_token + ["last"] * getattr(args, "last", False)
    places = places or [(side // 2, side // 2)]
    pixels = [[_on_map(place, layer, side) for place in places] for layer in layers]
    for layer, of_layer in zip(layers, pixels, strict=True):
        for pixel in of_layer:
            if pixel != "last":
                layer.place(pixel)
    pictures, seen = views(photographs(args.images), subject.data)
    for layer in layers:
        check(layer, len(seen), len(places))
    lines = len(layers) * len(seen) * len(places)
    if lines > _MOST_LINES and (args.out or not args.page):
        raise UserError(
            f"{lines} lines (layers, images, pixels) are too many for a picture: {_MOST_LINES} are allowed; take "
            "fewer, or --page for a page"
        )
    images = normalize(jnp.asarray(seen), subject.data.mean, subject.data.std)
    recorded = record(subject.model, images, layers)

    sheets = [Sheet(f"{subject.label}, {layer.name}, {layer.inside[0]}x{layer.inside[1]}", []) for layer in layers]
    with tqdm(total=len(layers) * len(seen), unit="map", disable=None) as progress:
        for sheet, layer, of_layer, own in zip(sheets, layers, pixels, recorded, strict=True):
            for b, (picture, image) in enumerate(zip(pictures, seen, strict=True)):
                of_image = [Recorded(one.x[b : b + 1], one.y[b : b + 1]) for one in own]
                for place, pixel, maps in zip(places, of_layer, maps_of(layer, of_image, of_layer), strict=True):
                    label = f"{picture.file.name}: {_told(place, pixel)}{maps.note}"
                    sheet.lines.append(_line(label, pixel, maps.panels, image, layer.inside))
                progress.update()
    words = f"{words}. Parameters: {subject.taken}."
    if args.page:
        _write_page(args.page, f"{title} of {subject.label}", words, sheets)
        print(f"{args.page}: layers {len(layers)}, images {len(pictures)}, pixels {len(places)}")
    if args.out or not args.page:
        out = args.out or args.default_out
        draw_sheets(sheets, words, out)
        print(f"{out}: {', '.join(sheet.title.split(', ', 1)[1] for sheet in sheets)}")


def _told(place: Pixel | str, pixel: Pixel | str) -> str:
    """Return in words a pixel of the image and the one of a map that covers it."""
    return _IN_WORDS[pixel] if isinstance(pixel, str) else f"pixel {place}, on the map {pixel}"


def _line(label: str, pixel: Pixel | str, panels: Sequence[Panel], image: np.ndarray, inside: tuple[int, int]) -> Line:
    rows, columns = inside
    cut = [panel._replace(values=panel.values[:rows, :columns]) for panel in panels]
    return Line(label, image, None if isinstance(pixel, str) else pixel, cut)


def _checked(row: int, column: int, side: int) -> tuple[int, int]:
    if not (0 <= row < side and 0 <= column < side):
        raise UserError(
            f"--pixel {row} {column} is outside of the image that the model sees: 0 to {side - 1} are allowed for both"
        )
    return row, column


def _on_map(place: Pixel, layer: ScanLayer, side: int) -> Pixel:
    """Return the pixel of a layer's map that covers one of the image."""
    if isinstance(place, str):
        return place
    (rows, columns), (row, column) = layer.inside, place
    return row * rows // side, column * columns // side


def _write_page(path: Path, title: str, words: str, sheets: Sequence[Sheet]) -> None:
    sections = [page.Section("What is shown", page.text(words))]
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "maps.png"
        for sheet in sheets:
            body = ""
            for first in range(0, len(sheet.lines), _LINES_A_PICTURE):
                part = Sheet("", sheet.lines[first : first + _LINES_A_PICTURE])
                draw_sheets([part], "", picture)
                body += page.picture(picture, f"maps of {sheet.title}: {'; '.join(line.label for line in part.lines)}")
            sections.append(page.Section(sheet.title, body))
        page.write_page(path, title, sections)


def _html(text: str) -> Path:
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError(f"{text} must end in .html")
    return Path(text)
