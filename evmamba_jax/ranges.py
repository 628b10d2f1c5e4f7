"""What a field of a dataclass may hold: said beside the field, checked in one place with the type that it declares.

    lr: float = ranged(2e-3, above=0)
    name: str = chosen("adamw", ("adamw", "lamb"))

A subclass that gives such a field another default keeps its rule.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.errors import UserError

_KEY = "rule"


class Rule(NamedTuple):
    """What a field may hold.

    Attributes:
        words: the same for the reader.
        holds: whether it does.
        whole: ``holds`` takes the value as it is, whatever its type; otherwise each number in it.
    """

    words: str
    holds: Callable[[Any], bool]
    whole: bool = False


def ranged(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    words: str = "",
) -> Any:
    """Return a field for a number between two ends, or for several that all are.

    Args:
        default: its default value.
        least: the smallest number allowed.
        above: what it must be greater than.
        most: the greatest number allowed.
        below: what it must be smaller than.
        words: says what is allowed, where the ends alone say too little.
    """
    start, end = (least if above is None else above), (most if below is None else below)
    if end is None:
        told = f"{start} or more" if above is None else f"above {start}"
    elif above is not None:
        told = f"above {start}, {'up to' if below is None else 'below'} {end}"
    else:
        told = f"{start} to {end}" if below is None else f"from {start} to below {end}"

    def holds(number: float) -> bool:
        return (
            (least is None or number >= least)
            and (above is None or number > above)
            and (most is None or number <= most)
            and (below is None or number < below)
        )

    return _field(default, Rule(words or told, holds))


def chosen(default: Any, names: Iterable[Any]) -> Any:
    """Return a field for one of some names."""
    names = tuple(names)
    return stated(default, _either(names), lambda value: _among(value, names))


def share(default: float) -> Any:
    """Return a field for a probability."""
    return ranged(default, least=0, most=1, words="a probability, 0 to 1")


def place(default: str) -> Any:
    """Return a field for a file or folder, as text or as a path."""
    return stated(default, "a file or folder", lambda value: isinstance(value, str | os.PathLike))


def stated(default: Any, words: str, holds: Callable[[Any], bool]) -> Any:
    """Return a field for values that a function knows, in place of the declared type."""
    return _field(default, Rule(words, holds, whole=True))


def free(default: Any) -> Any:
    """Return a field for any value of its type: none is wrong, or only who uses it can tell."""
    return _field(default, None)


def _field(default: Any, rule: Rule | None) -> Any:
    return dataclasses.field(default=default, metadata={_KEY: rule})


def is_dtype(value: Any) -> bool:
    """Return whether a model can compute in a type: a name, what JAX and NumPy call a type, or None for any."""
    return value is None or np.dtype(value).name in ("float16", "bfloat16", "float32", "float64")


def has_rule(kind: type, name: str) -> bool:
    """Return whether a field of a dataclass, or the one that it replaces, says what it may hold."""
    return any(_KEY in field.metadata for field in _replaced(kind, name))


def plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's and lists as tuples, which can be compared and hashed."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(plain, value)) if type(value) in (list, tuple) else value


def check(values: Any, prefix: str = "") -> None:
    """Check type and rule of every field of a dataclass, and of those in it.

    Args:
        values: the dataclass.
        prefix: stands before the names of the fields in a message.

    Raises:
        UserError: naming the first field that is wrong, its value and what is allowed.
    """
    for name, hint in _hints(type(values)).items():
        value = getattr(values, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            allowed = None if isinstance(value, hint) else f"a {hint.__name__}"
        else:
            allowed = _allowed_instead(value, hint, _rule(type(values), name))
        if allowed is not None:
            shown = " ".join(repr(value).split())[:200]
            raise UserError(f"{prefix}{name}={shown} is not allowed: it must be {allowed}")
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(hint):
            check(value, f"{prefix}{name}.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _replaced(kind: type, name: str) -> list[dataclasses.Field]:
    """Return a field, and the fields of base classes that it replaces; the nearest comes first."""
    tables = [vars(base).get("__dataclass_fields__", {}) for base in kind.__mro__]
    return [table[name] for table in tables if name in table]


@functools.cache
def _rule(kind: type, name: str) -> Rule | None:
    rules = [field.metadata[_KEY] for field in _replaced(kind, name) if _KEY in field.metadata]
    return rules[0] if rules else None


def _allowed_instead(value: Any, hint: Any, rule: Rule | None) -> str | None:
    """Return what is allowed in place of a value in words; None where it is allowed itself."""
    if rule is not None and rule.whole:
        with contextlib.suppress(TypeError, ValueError):
            if rule.holds(value):
                return None
        return rule.words
    if not _fits(value, hint):
        return f"{_named(hint)}, {rule.words}" if rule is not None else _named(hint)
    if rule is None or all(map(rule.holds, _numbers(value))):
        return None
    return f"numbers {rule.words}" if isinstance(value, list | tuple) else rule.words


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return _among(value, inner)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if origin in (tuple, collections.abc.Sequence):
        if not isinstance(value, list | tuple):
            return False
        of_any_length = origin is not tuple or inner[-1] is Ellipsis
        kinds = inner[:1] * len(value) if of_any_length else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is Any:
        return True
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and not _endless(value)
    return isinstance(value, hint)


_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}


def _named(hint: Any) -> str:
    """Return a type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_named, inner))
    if origin is typing.Literal:
        return _either(inner)
    if origin is dict:
        return "a dictionary with names for keys"
    if origin in (tuple, collections.abc.Sequence):
        count = f"{len(inner)} " if origin is tuple and inner[-1] is not Ellipsis else ""
        return f"a tuple of {count}{_named(inner[0]).removeprefix('a ')}s"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _either(names: Iterable[Any]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


def _among(value: Any, names: Iterable[Any]) -> bool:
    return any(type(value) is type(name) and value == name for name in names)  # True is no 1


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [] if value is None or isinstance(value, str) else [value]


def _endless(number: Any) -> bool:
    """Return whether a number is infinite, or none."""
    return number != number or abs(number) == math.inf
