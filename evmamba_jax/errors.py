"""The one exception that stands for a user's mistake."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake the user can mend: one line that names the thing, its value, what is allowed and what to do.

    The commands print it as ``error: ...`` and leave with exit code 2; a library caller sees an ordinary ValueError.
    """


def printable(text: str) -> str:
    """Return text as one line: what ends it, moves the cursor or is no letter is escaped, as ``\\n`` or ``\\x1b``."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def nearest(name: str, allowed) -> str:
    """Return ``", did you mean 'x'?"`` for the closest of ``allowed``, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def one_of(option: str, name: str, allowed: Mapping[str, T]) -> T:
    """Return the entry of ``allowed`` called ``name``; raises a UserError that names the option and what is allowed."""
    if name not in allowed:
        known = ", ".join(map(repr, allowed))
        raise UserError(f"unknown {option} {name!r}{nearest(name, allowed)}; allowed: {known}")
    return allowed[name]
