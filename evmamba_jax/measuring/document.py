"""Results as data: a JSON file, and the Markdown that is rendered from it.

A document has a title, the environment (machine, versions, date), the parts that a program writes, and notes that
people write, which the program keeps. A part is a heading, text (lines of Markdown) or a table: columns, and rows of
cells. Strings stand as they are, None is an empty cell, and numbers, or lists of them, are written by the column's
format.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evmamba_jax.storage import written_whole

dumps = functools.partial(json.dumps, ensure_ascii=False)
Cell = str | float | None | Sequence[str | float]


def markdown(document: dict[str, Any]) -> str:
    """Render a document."""
    parts = [*document["parts"], *document.get("notes", [])]
    blocks = [f"# {document['title']}", environment(document), *map(part_markdown, parts)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def environment(document: dict[str, Any]) -> str:
    """Return the line that says on what, with what and when."""
    known = document.get("environment", {})
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    line = "; ".join(filter(None, (known.get("machine"), versions, known.get("date"))))
    return f"{line}." if line else ""


def part_markdown(part: dict[str, Any]) -> str:
    """Render one part."""
    if "heading" in part:
        return f"## {part['heading']}"
    if "text" in part:
        return "\n".join(part["text"])
    return "\n".join([*head(part["columns"]), *(row_markdown(part["columns"], row) for row in part["rows"])])


def head(columns: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield the two lines above a table's rows; columns of numbers are flush right."""
    yield line(column["name"] for column in columns)
    yield line("---:" if "format" in column else "---" for column in columns)


def row_markdown(columns: Sequence[dict[str, str]], row: Sequence[Cell]) -> str:
    """Render one row of a table."""
    cells = [*row, *[None] * (len(columns) - len(row))]
    return line(written(cell, column.get("format", "{}")) for column, cell in zip(columns, cells, strict=True))


def written(cell: Cell, form: str) -> str:
    """Render one cell."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    return form.format(*cell) if isinstance(cell, Sequence) else form.format(cell)


def line(cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def to_json(document: dict[str, Any]) -> str:
    """Return the text of a JSON file with a line for each row, column and line of text."""
    items = [
        f' "{name}": {parts_json(value) if name in ("parts", "notes") else dumps(value)}'
        for name, value in document.items()
    ]
    return "{\n" + ",\n".join(items) + "}\n"


def parts_json(parts: Sequence[dict[str, Any]]) -> str:
    """Return the JSON of the parts of a document."""
    texts = []
    for part in parts:
        items = []
        for name, value in part.items():
            lines = [f"    {dumps(item)}" for item in value] if isinstance(value, list) else []
            items.append(f'   "{name}": ' + ("[\n" + ",\n".join(lines) + "]" if lines else dumps(value)))
        texts.append("  {\n" + ",\n".join(items) + "}")
    return "[\n" + ",\n".join(texts) + "]"


def to_digits(cell: Cell) -> Cell:
    """Return a number of six digits, which is more than any measurement has."""
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        return [to_digits(one) for one in cell]  # type: ignore[return-value]
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


class Report:
    """A document that grows: printed as it comes and, if there is a place, written after each addition.

    Args:
        title: its heading.
        out: the JSON file.
        page: the Markdown file; beside the JSON where not given.
        started: a document that was broken off, which goes on: what is added comes after its last part, or as a row of
            that. Title and environment are then its own.
        environment: machine (text), versions ({package: version}) and date, as far as they are known.
    """

    def __init__(
        self,
        title: str,
        out: Path | None = None,
        *,
        page: Path | None = None,
        started: dict[str, Any] | None = None,
        **environment: Any,
    ):
        self.document: dict[str, Any] = started or {"title": title, "environment": environment, "parts": []}
        notes = json.loads(out.read_text()).get("notes") if not started and out and out.exists() else None
        if notes:
            self.document["notes"] = notes
        self.out, self.page = out, page or (out and out.with_suffix(".md"))
        print(markdown(self.document), end="", flush=True)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._add({"heading": text})

    def text(self, text: str) -> None:
        """Add Markdown."""
        self._add({"text": text.splitlines()})

    def table(self, *columns: str | tuple[str, str]) -> None:
        """Begin a table: a column is its name, or its name and the format of its numbers."""
        named = [{"name": c} if isinstance(c, str) else {"name": c[0], "format": c[1]} for c in columns]
        self._add({"columns": named, "rows": []})

    def row(self, *cells: Cell) -> None:
        """Add a row to the table that was begun last; the rest of a short one is empty."""
        table = self.document["parts"][-1]
        table["rows"].append([to_digits(cell) for cell in cells])
        print(row_markdown(table["columns"], cells), flush=True)
        self._write()

    def _add(self, part: dict[str, Any]) -> None:
        self.document["parts"].append(part)
        print(f"\n{part_markdown(part)}", flush=True)
        self._write()

    def _write(self) -> None:
        for file, render in ((self.out, to_json), (self.page, markdown)):
            if file:
                with written_whole(file) as beside:
                    beside.write_text(render(self.document), encoding="utf-8")
