"""One-line complaints about arguments, the same for both public functions."""

import difflib

import jax
import jax.numpy as jnp


def as_arrays(function: str, **values) -> dict[str, jax.Array]:
    """Return the given values as floating-point arrays, leaving out those that are None.

    Raises TypeError naming the first that is no array of floating-point numbers.
    """
    arrays = {}
    for name, value in values.items():
        if value is None:
            continue
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise TypeError(f"{function}: {name} must be an array, got {type(value).__name__}")
        arrays[name] = jnp.asarray(value)
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise TypeError(
                f"{function}: {name} must hold floating-point numbers, got {arrays[name].dtype}; cast it first"
            )
    return arrays


def axis_sizes(function: str, arrays: dict[str, jax.Array], axes: dict[str, str]) -> dict[str, int]:
    """Return the size of every named axis, read from the first array that has it.

    ``axes`` gives each array's axes as words, ``{"u": "batch length channels"}``. Raises ValueError naming the first
    array that disagrees with those before it or has an empty axis.
    """
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        words = axes[name].split()
        fits = array.ndim == len(words) and all(
            sizes.get(word, size) == size for word, size in zip(words, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{word}={sizes[word]}" if word in sizes else word for word in words)
            raise ValueError(f"{function}: {name} has shape {array.shape}, expected ({wanted})")
        for word, size in zip(words, array.shape, strict=True):
            if size == 0:
                raise ValueError(f"{function}: {name} has shape {array.shape}, but {word} must be at least 1")
            sizes[word] = size
    return sizes


def mesh_axes(function: str, axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the axes that ``axis_name`` names; raise ValueError naming one that no ``jax.shard_map`` here is over."""
    if axis_name is None:
        return ()
    axes = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    bound = jax.sharding.get_abstract_mesh().manual_axes
    for axis in axes:
        if axis not in bound:
            there = f"one of {', '.join(map(repr, bound))}" if bound else "but there is none"
            raise ValueError(
                f"{function}: axis_name={axis!r} must be an axis of the jax.shard_map around the call, {there}"
            )
    return axes


def check_choice(function: str, implementation: str | None, allowed: tuple) -> None:
    """Raise ValueError, with the nearest name, for an implementation that is not among the ``allowed``."""
    if implementation in allowed:
        return
    names = [name for name in allowed if name is not None]
    close = difflib.get_close_matches(str(implementation), names, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"{function}: implementation={implementation!r} is not known; choose from None, "
        f"{', '.join(map(repr, names))}{hint}"
    )
