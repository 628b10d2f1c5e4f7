"""Official weights into our models, and back."""

import re
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from evmamba_jax import checkpoints
from evmamba_jax.arrays import Arrays, fill, split
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model, create_model
from evmamba_jax.models.efficientvmamba import EfficientVMamba
from evmamba_jax.models.mambavision import MambaVision
from evmamba_jax.models.msvmamba import MSVMamba
from evmamba_jax.models.vim import Vim
from evmamba_jax.models.vmamba import VMamba
from evmamba_jax.weights import efficientvmamba, mambavision, msvmamba, vim, vmamba
from evmamba_jax.weights.layers import Row
from evmamba_jax.weights.torch_file import load_torch_file


class _Official(NamedTuple):
    """What a family's official names are: its table, and patterns of older names with what they became."""

    table: Callable[[Any], list[Row]]
    old_names: Mapping[str, str] = {}


_FAMILIES: Mapping[type[nnx.Module], _Official] = {
    EfficientVMamba: _Official(efficientvmamba.table, vmamba.OLD_NAMES),
    MambaVision: _Official(mambavision.table),
    MSVMamba: _Official(msvmamba.table, vmamba.OLD_NAMES),
    Vim: _Official(vim.table),
    VMamba: _Official(vmamba.table, vmamba.OLD_NAMES),
}


def from_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray], *, resize: bool = False) -> None:
    """Fill a model in place with official weights; afterwards it computes what the official model does.

    Args:
        model: an NNX module of :func:`evmamba_jax.create_model`.
        state_dict: ``{official name: array}``, as :func:`load_torch_file` gives it, in the official layout.
            BatchNorm's ``num_batches_tracked`` is ignored; every other name is used exactly once. Arrays are cast to
            the type of our parameter, except that float64 stays float64 where JAX has 64 bits enabled. A model without
            a head, such as a backbone, also takes the weights of a classifier, of which its ``adopt`` leaves out what
            it has no place for.
        resize: also take Vim's position embedding of another image size or stride, resized, as fine-tuning needs it.
            It is refused otherwise, because nothing else tells the weights of such variants apart.

    Raises:
        UserError: names are missing or left over, or shapes differ; lists the first of each. The model is unchanged.
    """
    given, rows = _with_current_names(model, state_dict), table(model)
    paths = {row.official: row.ours for row in rows}
    official = {row.ours: row.official for row in rows}
    ours = {paths.get(name, name): array for name, array in given.items()}
    adopted = cast("Any", model).adopt(ours, resize=resize)
    fill_rows(model, rows, {official.get(path, path): array for path, array in adopted.items()})


def count_classes(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> int | None:
    """Return the classes of official weights of a model's family, read off their head; None where they have none."""
    given = _with_current_names(model, state_dict)
    names = [row.official for row in table(model) if row.ours == "head.bias"]
    return next((given[name].size for name in names if name in given), None)


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the weights of a model as ``{official name: array}``, which the official code loads.

    The inverse of :func:`from_torch`, to the bit. BatchNorm's ``num_batches_tracked``, which we do not keep, is 0.
    """
    ours = _arrays(model)
    official = {}
    for row in table(model):
        if row.ours in ours:
            official[row.official] = row.layout.to_official(np.asarray(ours[row.ours]))
            if row.official.endswith("running_var"):
                official[row.official.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return official


def table(model: nnx.Module) -> list[Row]:
    """Return our path, the official name and the layouts of every parameter the family has; see ``layers.Row``."""
    return _family(model).table(model)


def _family(model: nnx.Module) -> _Official:
    if type(model) not in _FAMILIES:
        known = ", ".join(family.__name__ for family in _FAMILIES)
        raise UserError(f"no table of official names for {type(model).__name__}; there is one for {known}")
    return _FAMILIES[type(model)]


def _with_current_names(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = dict(state_dict)
    for old, new in _family(model).old_names.items():
        given = {re.sub(old, new, name): array for name, array in given.items()}
    return given


def _arrays(model: nnx.Module) -> Arrays:
    _, params, batch_stats = split(model)
    return {**params, **batch_stats}


def fill_rows(model: nnx.Module, rows: Iterable[Row], state_dict: Mapping[str, np.ndarray]) -> None:
    """Fill a model, or a part of one, by rows, one for each of its arrays; otherwise as from_torch."""
    _, params, batch_stats = split(model)
    ours = {**params, **batch_stats}
    by_path = {row.ours: row for row in rows if row.ours in ours}

    # Views without memory show which official shape ours stands for.
    wanted = {
        row.official: row.layout.to_official(np.broadcast_to(np.int8(0), ours[row.ours].shape)).shape
        for row in by_path.values()
    }
    given = {
        name: _as_matrix(array, wanted.get(name))
        for name, array in state_dict.items()
        if not name.endswith("num_batches_tracked")
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
        options = "variant, num_classes and image_size" if "pos_embed" in wanted else "variant and num_classes"
        raise UserError(f"the weights do not fit {type(model).__name__} ({text}); take the {options} they are for")

    def filled(arrays: Arrays) -> Arrays:
        return {
            path: _cast(by_path[path].layout.to_ours(given[by_path[path].official]), array.dtype)
            for path, array in arrays.items()
        }

    fill(model, filled(params), filled(batch_stats))


def _as_matrix(array: np.ndarray, wanted: tuple[int, ...] | None) -> np.ndarray:
    """Take the 1x1 kernel of a convolution for the matrix it is; VMamba's files have some layers in either form."""
    is_kernel = wanted is not None and len(wanted) == 2 and array.ndim == 4 and array.shape[2:] == (1, 1)
    return array[:, :, 0, 0] if is_kernel else array


def _cast(array: np.ndarray, dtype: np.dtype) -> jnp.ndarray:
    # Without 64 bits enabled jnp.array would warn about the float64 it cannot keep.
    wide = array.dtype == np.float64 and jnp.zeros((), float).dtype == np.float64
    return jnp.array(array, np.float64 if wide else dtype)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def convert_file(
    torch_file: str | PathLike[str],
    model_name: str,
    out: str | PathLike[str],
    *,
    key: str | None = None,
    **options: Any,
) -> None:
    """Write the weights in a file as an orbax checkpoint for ``create_model(model_name, pretrained=out)``.

    Args:
        torch_file: a .pth or .safetensors file of the official code.
        model_name: one of :func:`evmamba_jax.list_models`.
        out: folder for the checkpoint; new or empty.
        key: the entry of the file to take, as for :func:`load_torch_file`.
        **options: of the model, e.g. ``num_classes=10``, when the file is not one of the published models.

    Raises:
        UserError: ``out`` holds something already; otherwise as ``create_model``, ``load_torch_file``, ``from_torch``.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not an empty folder; name a new folder for the checkpoint")
    model = abstract_model(model_name, **options)  # all of its initial values would be replaced
    from_torch(model, load_torch_file(torch_file, key=key))
    _, params, batch_stats = split(model)
    meta = {"model": model_name, "options": options, "converted_from": Path(torch_file).name, "key": key}
    checkpoints.save_model(folder, params=params, batch_stats=batch_stats, meta=meta)


def export_file(directory: str | PathLike[str], model_name: str, out: str | PathLike[str], **options: Any) -> None:
    """Write a checkpoint of ours as a .safetensors file whose names the official code loads.

    Args:
        directory: folder of a converted model, of a training run, or of one of its checkpoints.
        model_name: one of :func:`evmamba_jax.list_models`.
        out: the file; must not exist.
        **options: of the model, e.g. ``num_classes=10``, where they are not those of the published one.

    Raises:
        UserError: ``out`` exists or does not end in .safetensors; otherwise as ``create_model``.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise UserError(f"{str(out)!r} must end in .safetensors, the one kind of file that is written")
    if path.exists():
        raise UserError(f"{str(out)!r} exists; name a new file")
    official = to_torch(create_model(model_name, pretrained=directory, **options))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in official.items()}, path)
