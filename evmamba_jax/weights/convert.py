"""Official weights into our models."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax import checkpoint, functional
from evmamba_jax.errors import UserError
from evmamba_jax.models import create_model
from evmamba_jax.models.efficientvmamba import EfficientVMamba
from evmamba_jax.weights import efficientvmamba
from evmamba_jax.weights.layers import Row
from evmamba_jax.weights.torch_file import load_torch_file

_TABLES: Mapping[type[nnx.Module], Callable[[Any], list[Row]]] = {EfficientVMamba: efficientvmamba.table}


def from_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
    """Fill a model in place with official weights; afterwards it computes what the official model does.

    Args:
        model: an NNX module of :func:`evmamba_jax.create_model`.
        state_dict: ``{official name: array}``, as :func:`load_torch_file` gives it, in the official layout.
            BatchNorm's ``num_batches_tracked`` is ignored; every other name is used exactly once. Arrays are cast to
            the type of our parameter, except that float64 stays float64 where JAX has 64 bits enabled.

    Raises:
        UserError: names are missing or left over, or shapes differ; lists the first of each. The model is unchanged.
    """
    table = _TABLES.get(type(model))
    if table is None:
        known = ", ".join(family.__name__ for family in _TABLES)
        raise UserError(f"no table of official names for {type(model).__name__}; there is one for {known}")
    fill(model, table(model), state_dict)


def fill(model: nnx.Module, table: Iterable[Row], state_dict: Mapping[str, np.ndarray]) -> None:
    """Fill a model, or a part of one, by a table that has a row for each of its arrays; otherwise as from_torch."""
    rows = {row.ours: row for row in table}
    given = {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}
    _, params, batch_stats = functional.split(model)
    ours = {**params, **batch_stats}

    # Views without memory show which official shape ours stands for.
    wanted = {
        row.official: row.layout.to_official(np.broadcast_to(np.int8(0), ours[row.ours].shape)).shape
        for row in rows.values()
    }
    missing = [repr(name) for name in wanted if name not in given]
    unexpected = [repr(name) for name in given if name not in wanted]
    differing = [
        f"{name!r} is {tuple(given[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in problems.items() if names)
        raise UserError(
            f"the weights do not fit {type(model).__name__} ({text}); create the variant and num_classes they are for"
        )

    def filled(arrays: functional.Arrays) -> functional.Arrays:
        return {
            path: _cast(rows[path].layout.to_ours(given[rows[path].official]), arrays[path].dtype) for path in arrays
        }

    functional.fill(model, filled(params), filled(batch_stats))


def _cast(array: np.ndarray, dtype: np.dtype) -> jnp.ndarray:
    # Without 64 bits enabled jnp.array would warn about the float64 it cannot keep.
    wide = array.dtype == np.float64 and jnp.zeros((), float).dtype == np.float64
    return jnp.array(array, np.float64 if wide else dtype)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def convert_file(
    torch_file: str | PathLike[str], model_name: str, out: str | PathLike[str], *, key: str | None = None
) -> None:
    """Write the weights in a file as an orbax checkpoint for ``create_model(model_name, pretrained=out)``.

    Args:
        torch_file: a .pth or .safetensors file of the official code.
        model_name: one of :func:`evmamba_jax.list_models`.
        out: folder for the checkpoint; new or empty.
        key: the entry of the file to take, as for :func:`load_torch_file`.

    Raises:
        UserError: ``out`` holds something already; otherwise as ``create_model``, ``load_torch_file``, ``from_torch``.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not an empty folder; name a new folder for the checkpoint")
    model = nnx.eval_shape(lambda: create_model(model_name))  # all of its initial values would be replaced
    from_torch(model, load_torch_file(torch_file, key=key))
    _, params, batch_stats = functional.split(model)
    meta = {"model": model_name, "converted_from": Path(torch_file).name, "key": key}
    checkpoint.save_model(folder, params=params, batch_stats=batch_stats, meta=meta)
