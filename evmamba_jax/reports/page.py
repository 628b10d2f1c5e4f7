"""report.html: one page that holds all it shows, for a browser, a telephone, paper, and readers without colour."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from evmamba_jax.errors import printable
from evmamba_jax.storage import written_whole

REPORT = "report.html"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Noto Sans", sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #999; }
li, p { overflow-wrap: anywhere; }
img.wide { width: 100%; min-width: 34rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #666; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
.cards figure { margin: 0; break-inside: avoid; }
.cards img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #eee; }
.cards img[height] { height: auto; image-rendering: pixelated; }
.cards figcaption { font-size: .85rem; overflow-wrap: anywhere; }
pre { background: #f3f3f3; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media print {
  details::details-content { content-visibility: visible; display: block; height: auto; }
  body { max-width: none; padding: 0; font-size: 11px; }
  h2 { break-after: avoid; }
  tr, img.wide { break-inside: avoid; }
  img.wide { min-width: 0; }
}
""".strip()


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        heading: plain text.
        body: HTML, as the functions of this file make it.
    """

    heading: str
    body: str


def text(line: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{_plain(line)}</p>"


def lines(items: Iterable[str]) -> str:
    """Return a list of plain lines."""
    return "<ul>" + "".join(f"<li>{_plain(item)}</li>" for item in items) + "</ul>"


def code(listing: str) -> str:
    """Return commands or a configuration as they stand."""
    return f"<pre>{html.escape(listing)}</pre>"


def folded(summary: str, body: str) -> str:
    """Return what is shown when its summary is opened, and on paper."""
    return f"<details><summary>{_plain(summary)}</summary>{body}</details>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, its first column flush left."""
    head = "".join(f'<th scope="col">{_plain(name)}</th>' for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_plain(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(file: Path, told: str) -> str:
    """Return a .png file as a picture of the page's width; ``told`` says what it shows."""
    return f'<div class="scroll"><img class="wide" alt="{_plain(told)}" src="{_data(file.read_bytes())}"></div>'


def cards(images: Iterable[np.ndarray], captions: Iterable[str]) -> str:
    """Return small pictures, uint8 (H, W, C), each above its caption."""
    figures = []
    for image, caption in zip(images, captions, strict=True):
        png = io.BytesIO()
        shown = image[..., 0] if image.shape[-1] in (1, 2) else image[..., :3]
        Image.fromarray(np.ascontiguousarray(shown)).save(png, "PNG")
        told, small = _plain(caption), max(shown.shape[:2]) < 64  # shown pixel by pixel
        size = f' width="{shown.shape[1]}" height="{shown.shape[0]}"' if small else ""
        figures.append(
            f'<figure><img alt="{told}"{size} src="{_data(png.getvalue())}"><figcaption>{told}</figcaption></figure>'
        )
    return f'<div class="cards">{"".join(figures)}</div>'


def write_page(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Write a page.

    Args:
        path: the file.
        title: plain text.
        sections: in their order.

    Raises:
        UserError: the folder is full or not writable.
    """
    body = "\n".join(f"<section><h2>{_plain(section.heading)}</h2>\n{section.body}</section>" for section in sections)
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_plain(title)}</title>\n<style>\n{_STYLE}\n</style></head>\n"
        f"<body><h1>{_plain(title)}</h1>\n{body}\n</body></html>\n"
    )
    with written_whole(path) as beside:
        # File names that are no UTF-8 give names with lone surrogates.
        beside.write_text(document, encoding="utf-8", errors="backslashreplace")


def _plain(line: str) -> str:
    return html.escape(printable(line))


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
