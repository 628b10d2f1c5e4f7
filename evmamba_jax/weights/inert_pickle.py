"""Reads a pickle as data: the stack machine of the format, without import, attribute look-up or call.

``pickle.Unpickler`` runs what a file asks for; restricting its ``find_class`` leaves calls, ``__setstate__`` and a memo
that allocates whatever index a file names. Here a class or function is only its dotted name (:class:`Global`). The few
calls that carry data are answered by a table of the caller; every other one gives an :class:`Inert` object.
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a pickle, as ``module.name``; never looked up."""

    name: str


@dataclass(frozen=True)
class Inert:
    """Stands for an object that was not rebuilt; takes state, items and elements without keeping them."""

    name: str


# Opcodes whose argument is the value itself.
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_VALUES = _NUMBERS | _STRINGS | _BYTES
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def call(function: Any, args: Any, rebuild: Mapping[str, Callable[..., Any]]) -> Any:
    """Return what ``rebuild`` makes of a call found in a pickle, or an :class:`Inert` object for any other call."""
    name = function.name if isinstance(function, Global | Inert) else type(function).__name__
    if isinstance(function, Global) and name in rebuild:
        return rebuild[name](*args)
    return Inert(name)


def load(
    stream: IO[bytes],
    rebuild: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """Return the object that the pickle at the position of ``stream`` describes.

    Args:
        stream: readable bytes (``read``, ``readline``, ``tell``); left just behind the pickle.
        rebuild: ``{"module.name": function}``, the only calls that are answered; they get the positional arguments.
        persistent: answers persistent ids (torch keeps its storages outside of the pickle).

    Returns:
        Plain Python values, what ``rebuild`` and ``persistent`` gave, :class:`Global` and :class:`Inert` objects.
        Dictionaries keep the items whose key is a string or an integer.

    Raises:
        Exception: of any kind when the pickle is damaged; the caller says which file it was.

    Source: the opcode table of the standard library's ``pickletools``.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below the open marks
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    def pop_call(function: Any, args: Any) -> None:
        stack.append(call(function, args, rebuild))

    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(stream)
    for opcode, arg, _ in operations:
        match opcode.name:
            case name if name in _VALUES:
                stack.append(arg)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE":
                items = tuple(to_mark())
                stack.append(items)
            case name if name in _TUPLE_SIZES:
                size = _TUPLE_SIZES[name]
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                items = to_mark()
                stack.append(items)
            case "APPEND":
                element = stack.pop()
                _extend(stack[-1], [element])
            case "APPENDS":
                items = to_mark()
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = to_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = to_mark()
                _set_items(stack[-1], items)
            case "EMPTY_SET":
                stack.append(Inert("set"))
            case "FROZENSET":
                to_mark()
                stack.append(Inert("frozenset"))
            case "ADDITEMS":
                to_mark()
            case "GLOBAL":
                stack.append(Global(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Global(".".join((module, name))))  # join, not format: fails for anything but strings
            case "EXT1" | "EXT2" | "EXT4":  # a class by its number in a registry of the writer
                stack.append(Inert(f"extension {arg}"))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                pop_call(function, args)
            case "NEWOBJ_EX":
                _, args, function = stack.pop(), stack.pop(), stack.pop()
                pop_call(function, args)
            case "OBJ":
                function, *args = to_mark()
                pop_call(function, args)
            case "INST":
                args = to_mark()
                pop_call(Global(arg.replace(" ", ".", 1)), args)
            case "BUILD":  # the state of an object; the tensors of a state dict are its items, never its state
                stack.pop()
            case "PERSID":
                stack.append(persistent(arg))
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case name:
                raise ValueError(f"pickle opcode {name} is not used by torch")
    raise ValueError("the pickle has no end")


def _extend(target: Any, elements: list[Any]) -> None:
    if not isinstance(target, Inert):
        if not isinstance(target, list):
            raise TypeError("elements for something that is not a list")
        target.extend(elements)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Inert):
        if not isinstance(target, dict):
            raise TypeError("items for something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str | int):  # never hashes an object built by the file
                target[key] = value
