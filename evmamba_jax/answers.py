"""What ``predict`` tells, draws and writes of many pictures, for each kind of answer."""

import abc
import argparse
import contextlib
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from evmamba_jax.data.outlines import resized
from evmamba_jax.detection.evaluate import Found, corner_and_size, named_rows
from evmamba_jax.errors import UserError, printable
from evmamba_jax.reports.contact_sheet import contact_sheet, thumbnail
from evmamba_jax.reports.detections import Boxes, draw_found_boxes
from evmamba_jax.reports.label_maps import draw_found_maps, indexed
from evmamba_jax.reports.predictions import guesses
from evmamba_jax.storage import storage_errors, written_whole

SCORE = 0.3  # from which on a box is told, drawn and written
LEAST_SCORE = 0.05  # below which a detector tells of no box
_SIDE = 1000  # pixels of the longer side of a picture with label map or boxes, at most, when it is drawn


class Picture(NamedTuple):
    """A file, and its path below the folder that was given; its name where none was."""

    file: Path
    inside: Path


class Answers(abc.ABC):
    """The answers for pictures, which come one after another; a context, which files are whole at the end of.

    Args:
        args: of the command.
        class_names: of the model.

    Attributes:
        words: what such a model does.
        own: options of the command that are for it alone.
        drawn: pictures in the drawing, at most.

    Raises:
        UserError: an option for another kind, or whose value cannot be.
    """

    words: ClassVar[str]
    own: ClassVar[tuple[str, ...]]
    drawn: ClassVar[int]

    def __init__(self, args: argparse.Namespace, class_names: Sequence[str]):
        for kind in KINDS.values():
            given = [name for name in kind.own if name not in self.own and getattr(args, name) is not None]
            if given:
                option = given[0].replace("_", "-")
                raise UserError(
                    f"--{option} is for a model that {kind.words}, and {args.weights} {self.words}: leave it out"
                )
        self.args, self.class_names, self.top = args, class_names, args.top
        self.kept: list[Any] = []
        self.table: Any = None
        self._open = contextlib.ExitStack()
        for file in filter(None, (getattr(args, name) for name in ("out", "csv", "embeddings", "sheet", "json"))):
            with storage_errors(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Answers":
        if self.args.csv:
            file = self._open.enter_context(written_whole(self.args.csv))
            table = file.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            self.table = csv.writer(self._open.enter_context(table))
            self.table.writerow(["image", *self.columns()])
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)

    def note(self, picture: Picture, image: np.ndarray, answer: Any) -> list[str]:
        """Keep what the files need of an answer, and return it in lines.

        Args:
            picture: its file.
            image: uint8 (H, W, C), as the predictor's ``view`` gives it.
            answer: the predictor's.
        """
        if len(self.kept) < self.drawn:
            self.kept.append(self.to_draw(str(picture.inside), image, answer))
        if self.table is not None:
            self.table.writerows([str(picture.file), *row] for row in self.rows(answer))
        return self.lines(picture, image, answer)

    @abc.abstractmethod
    def columns(self) -> list[str]:
        """Return the heads of the table of answers, behind that of the image."""

    @abc.abstractmethod
    def rows(self, answer: Any) -> list[list[Any]]:
        """Return the rows of an answer in this table, each without the image."""

    @abc.abstractmethod
    def to_draw(self, title: str, image: np.ndarray, answer: Any) -> Any:
        """Return what the drawing needs of an answer."""

    @abc.abstractmethod
    def lines(self, picture: Picture, image: np.ndarray, answer: Any) -> list[str]:
        """Note an answer, and return it in lines."""

    @abc.abstractmethod
    def draw(self, path: Path) -> None:
        """Draw what was kept as a .png file."""

    def finish(self, count: int) -> list[str]:
        """Write what is written at the end, and return a line for each file.

        Args:
            count: of all answers.
        """
        self.draw(self.args.out)
        return [f"{self.args.out} shows " + ("them" if count <= self.drawn else f"the first {self.drawn}")]

    def share(self, share: float, k: int) -> str:
        """Return the line of a class with its share."""
        return f"  {share:7.2%}  {k:>4}" + (
            f"  {printable(self.class_names[k])}" if self.class_names[k] != str(k) else ""
        )

    def more(self, count: int) -> list[str]:
        """Return the line that says how many of ``count`` were not told."""
        return [f"  and {count - self.top} more"] if count > self.top else []


class Classes(Answers):
    """Probabilities (K,) of classes, and embeddings (D,)."""

    words, drawn = "names classes", 24
    own = ("image_size", "embeddings", "sheet")

    def __init__(self, args: argparse.Namespace, class_names: Sequence[str]):
        super().__init__(args, class_names)
        self.top = min(self.top, len(class_names))
        self._names: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._thumbnails: list[tuple[np.ndarray, int, float]] = []

    def columns(self) -> list[str]:
        """Return class, name and probability of each of the most probable classes."""
        return [f"{what}_{i + 1}" for i in range(self.top) for what in ("class", "name", "probability")]

    def rows(self, answer: Any) -> list[list[Any]]:
        """Return one row."""
        return [[cell for k in self._best(answer) for cell in (k, self.class_names[k], f"{answer[0][k]:.6f}")]]

    def to_draw(self, title: str, image: np.ndarray, answer: Any) -> Any:
        """Return image, title and probabilities."""
        return image, Path(title).name, answer[0]

    def lines(self, picture: Picture, image: np.ndarray, answer: Any) -> list[str]:
        """Return the most probable classes."""
        shares, embedding = answer
        if self.args.embeddings:
            self._names.append(str(picture.file))
            self._vectors.append(embedding)
        if self.args.sheet:
            self._thumbnails.append((thumbnail(image), int(shares.argmax()), float(shares.max())))
        return [self.share(shares[k], k) for k in self._best(answer)]

    def draw(self, path: Path) -> None:
        """Draw each image beside its most probable classes."""
        images, titles, shares = zip(*self.kept, strict=True)
        guesses(path, np.stack(images), titles, np.stack(shares), self.class_names, self.top)

    def finish(self, count: int) -> list[str]:
        """Draw; write embeddings and sheet."""
        lines, args = super().finish(count), self.args
        if args.embeddings:
            with written_whole(args.embeddings) as beside, beside.open("wb") as file:
                np.savez(file, images=np.array(self._names), embeddings=np.stack(self._vectors))
            lines.append(f"{args.embeddings}: embeddings of {count} images, {len(self._vectors[0])} numbers each")
        if args.sheet:
            contact_sheet(args.sheet, self._thumbnails, self.class_names)
            lines.append(f"{args.sheet}: all of them, by the class found")
        return lines

    def _best(self, answer: Any) -> np.ndarray:
        return np.argsort(-answer[0], kind="stable")[: self.top]


class LabelMaps(Answers):
    """Label maps uint8 (H, W), of the size of their pictures."""

    words, own, drawn = "finds label maps", ("maps",), 12

    def __init__(self, args: argparse.Namespace, class_names: Sequence[str]):
        super().__init__(args, class_names)
        self._written: dict[Path, Path] = {}
        if args.maps:
            with storage_errors(args.maps):
                args.maps.mkdir(parents=True, exist_ok=True)
                if any(args.maps.iterdir()):
                    raise UserError(f"--maps {args.maps} holds files already: name a new folder for the label maps")

    def columns(self) -> list[str]:
        """Return those of a class that is there."""
        return ["class", "name", "share"]

    def rows(self, answer: np.ndarray) -> list[list[Any]]:
        """Return a row for each class that is there, the largest first."""
        shares = self._shares(answer)
        return [[k, self.class_names[k], f"{shares[k]:.6f}"] for k in self._largest(shares)]

    def to_draw(self, title: str, image: np.ndarray, answer: np.ndarray) -> Any:
        """Return image and map, not larger than they are drawn, the shares and the title."""
        step = -(-max(answer.shape) // _SIDE)
        return _smaller(image, answer[::step, ::step].shape), answer[::step, ::step], self._shares(answer), title

    def lines(self, picture: Picture, image: np.ndarray, answer: np.ndarray) -> list[str]:
        """Write the map, and return the classes by their share of the picture."""
        if self.args.maps:
            inside = picture.inside.with_suffix(".png")
            if inside in self._written:
                raise UserError(
                    f"{self._written[inside]} and {picture.file} would have the same label map {inside}: predict them "
                    "one after the other, with a folder for --maps each"
                )
            self._written[inside] = picture.file
            path = self.args.maps / inside
            with storage_errors(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as beside:
                indexed(answer, len(self.class_names)).save(beside, "PNG")
        shares = self._shares(answer)
        largest = self._largest(shares)
        return [*(self.share(shares[k], k) for k in largest[: self.top]), *self.more(len(largest))]

    def draw(self, path: Path) -> None:
        """Draw each picture beside its map, and the classes in it."""
        draw_found_maps(path, self.kept, self.class_names)

    def finish(self, count: int) -> list[str]:
        """Draw, and say where the maps are."""
        maps = [f"{self.args.maps}: {count} label maps, a class index a pixel"] if self.args.maps else []
        return super().finish(count) + maps

    def _largest(self, shares: np.ndarray) -> np.ndarray:
        return np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)]

    def _shares(self, answer: np.ndarray) -> np.ndarray:
        return np.bincount(answer.ravel(), minlength=len(self.class_names)) / answer.size


class FoundBoxes(Answers):
    """Boxes with classes, scores and perhaps masks, in pixels of their pictures."""

    words, own, drawn = "finds boxes", ("score", "json"), 12

    def __init__(self, args: argparse.Namespace, class_names: Sequence[str]):
        super().__init__(args, class_names)
        self._least = SCORE if args.score is None else args.score
        if not LEAST_SCORE <= self._least <= 1:
            raise UserError(f"--score is {self._least}; it must be from {LEAST_SCORE} to 1")
        self._rows: list[dict[str, Any]] = []

    def columns(self) -> list[str]:
        """Return those of a box, in pixels."""
        return ["class", "name", "score", "x", "y", "width", "height"]

    def rows(self, answer: Found) -> list[list[Any]]:
        """Return a row for each box, the surest first."""
        return [
            [k, self.class_names[k], f"{score:.6f}", *(f"{side:.1f}" for side in corner_and_size(box))]
            for box, score, k in zip(*answer.above(self._least)[:3], strict=True)
        ]

    def to_draw(self, title: str, image: np.ndarray, answer: Found) -> Any:
        """Return an image not larger than it is drawn, its boxes and masks, and the title."""
        step = max(1.0, max(image.shape) / _SIDE)
        small = _smaller(image, [max(1, round(side / step)) for side in image.shape[:2]])
        sure = answer.above(self._least)
        masks = None if sure.outlines is None else resized(sure.outlines, *small.shape[:2])
        return small, Boxes(sure.boxes / step, sure.labels, sure.scores, masks), title

    def lines(self, picture: Picture, image: np.ndarray, answer: Found) -> list[str]:
        """Return the surest boxes: corner, width and height in pixels."""
        sure = answer.above(self._least)
        if self.args.json:
            self._rows += named_rows(str(picture.file), sure, self.class_names)
        if not len(sure.labels):
            return [f"  nothing with a score of {self._least} or more"]
        lines = []
        for box, score, k in zip(*(column[: self.top] for column in sure[:3]), strict=True):
            x, y, width, height = corner_and_size(box)
            lines.append(f"{self.share(score, k)}  at {x:.0f}, {y:.0f}: {width:.0f} x {height:.0f}")
        return lines + self.more(len(sure.labels))

    def draw(self, path: Path) -> None:
        """Draw each picture with its boxes."""
        draw_found_boxes(path, self.kept, self.class_names)

    def finish(self, count: int) -> list[str]:
        """Draw; write the boxes of all pictures."""
        lines = super().finish(count)
        if self.args.json:
            with written_whole(self.args.json) as file:
                file.write_text(json.dumps(self._rows), encoding="utf-8", errors="surrogateescape")
            lines.append(f"{self.args.json}: {len(self._rows)} boxes of {count} images")
        return lines


KINDS: dict[str, type[Answers]] = {"classes": Classes, "label_maps": LabelMaps, "boxes": FoundBoxes}


def _smaller(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return an image, uint8 (H, W, 3), resized to a height and width that are no larger."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))
