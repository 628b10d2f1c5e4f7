"""The names of ADE20K's 150 classes."""

from pathlib import Path


def ade20k_classes() -> tuple[str, ...]:
    """Return the names in label order, short as mmseg has them."""
    return tuple((Path(__file__).parent / "ade20k_classes.txt").read_text(encoding="utf-8").splitlines())
