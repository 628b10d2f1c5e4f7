"""Official weights into our models, and back."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.arrays import Arrays, fill, split
from evmamba_jax.errors import UserError
from evmamba_jax.layers.backbone import Backbone
from evmamba_jax.models.course_vim import CourseVim
from evmamba_jax.models.efficientvmamba import EfficientVMamba
from evmamba_jax.models.mambavision import MambaVision
from evmamba_jax.models.msvmamba import MSVMamba
from evmamba_jax.models.vim import Vim
from evmamba_jax.models.vmamba import VMamba
from evmamba_jax.weights import course_vim, efficientvmamba, mambavision, msvmamba, vim, vmamba
from evmamba_jax.weights.fit import fit_body
from evmamba_jax.weights.layers import Row


class _Official(NamedTuple):
    """What a family's official names are.

    Attributes:
        table: makes the rows of a model.
        old_names: patterns of older names, with what they became.
        ours: options that only we have, by name with the value that the official code stands for.
        buffers: makes, by official name, what the official model keeps and ours computes.
        body: of a segmenter or detector: what the names of its backbone begin with.
    """

    table: Callable[[Any], list[Row]]
    old_names: Mapping[str, str] = {}
    ours: Mapping[str, Any] = {}
    buffers: Callable[[Any], dict[str, np.ndarray]] = lambda model: {}
    body: str = "backbone"


_FAMILIES: dict[type[nnx.Module], _Official] = {
    EfficientVMamba: _Official(efficientvmamba.table, vmamba.OLD_NAMES),
    MambaVision: _Official(mambavision.table, ours=mambavision.OURS_ALONE),
    MSVMamba: _Official(msvmamba.table, vmamba.OLD_NAMES),
    Vim: _Official(vim.table, ours={"squeeze_excite": None, "local": "causal"}, buffers=vim.buffers),
    VMamba: _Official(vmamba.table, vmamba.OLD_NAMES),
    CourseVim: _Official(course_vim.table),
}


def register(kind: type[nnx.Module], table: Callable[[Any], list[Row]], body: str = "backbone") -> None:
    """Enter the table of a segmenter or detector, whose ``backbone`` has official names that begin with ``body``."""
    _FAMILIES[kind] = _Official(table, body=body)


def from_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray], *, resize: bool = False) -> None:
    """Fill a model in place with official weights; afterwards it computes what the official model does.

    Args:
        model: an NNX module of :func:`evmamba_jax.create_model`, or a segmenter.
        state_dict: ``{official name: array}``, as :func:`load_torch_file` gives it, in the official layout.
            BatchNorm's ``num_batches_tracked`` is ignored, and so are tables that follow from the options; every other
            name is used exactly once. Arrays are cast to the type of our parameter, except that float64 stays float64
            where JAX has 64 bits enabled. A model without a head, such as a backbone, also takes the weights of a
            classifier; ``fit.py`` says what it leaves out.
        resize: also take Vim's position embedding of another image size or stride, resized, as fine-tuning needs it.
            It is refused otherwise, because nothing else tells the weights of such variants apart.

    Raises:
        UserError: names are missing or left over, or shapes differ; lists the first of each. The model is unchanged.
    """
    arrays = by_path(model, state_dict)
    if isinstance(model, Backbone):  # a segmenter or detector takes its own weights only
        arrays = fit_body(model, arrays, resize=resize)
    _fill(model, from_official(model, table(model), arrays))


def by_path(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return official weights, still in their layout, by our paths; a name of no parameter of ours stays."""
    given = dict(state_dict)
    for old, new in _old_names(model).items():
        given = {re.sub(old, new, name): array for name, array in given.items()}
    paths, computed = {row.official: row.ours for row in table(model)}, _buffers(model)
    return {paths.get(name, name): array for name, array in given.items() if name not in computed}


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the weights of a model as ``{official name: array}``, which the official code loads.

    The inverse of :func:`from_torch`, to the bit. BatchNorm's ``num_batches_tracked``, which we do not keep, is 0.
    """
    ours = _arrays(model)
    official = _buffers(model)
    for row in table(model):
        if row.ours in ours:
            official[row.official] = row.layout.to_official(np.asarray(ours[row.ours]))
            if row.official.endswith("running_var"):
                official[row.official.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return official


def table(model: nnx.Module) -> list[Row]:
    """Return our path, the official name and the layouts of every parameter the family has; see ``layers.Row``.

    Raises:
        UserError: the model has an option that the official code has not, or is of no family with official code.
    """
    return _family(model).table(model)


def _old_names(model: Any) -> dict[str, str]:
    own = _family(model).old_names
    if isinstance(model, Backbone):
        return dict(own)
    below, body = _old_names(model.backbone), _family(model).body
    return {re.sub(r"^\^", rf"^{body}\\.", old): f"{body}.{new}" for old, new in below.items()}


def _buffers(model: Any) -> dict[str, np.ndarray]:
    if isinstance(model, Backbone):
        return _family(model).buffers(model)
    return {f"{_family(model).body}.{name}": array for name, array in _buffers(model.backbone).items()}


def _family(model: Any) -> _Official:
    if type(model) not in _FAMILIES:
        known = ", ".join(family.__name__ for family in _FAMILIES)
        raise UserError(f"no table of official names for {type(model).__name__}; there is one for {known}")
    family = _FAMILIES[type(model)]
    options = {**family.ours, "inner": ()} if isinstance(model, Backbone) else {}
    for option, value in options.items():  # what a cut leaves is of no official shape
        if (own := getattr(model.config, option)) != value:
            name = type(model).__name__
            raise UserError(f"{name} with {option}={own!r} has no official names: only {option}={value!r} has weights")
    return family


def _arrays(model: nnx.Module) -> Arrays:
    _, params, batch_stats = split(model)
    return {**params, **batch_stats}


def fill_rows(model: nnx.Module, rows: Iterable[Row], state_dict: Mapping[str, np.ndarray]) -> None:
    """Fill a model, or a part of one, by rows, one for each of its arrays; otherwise as from_torch."""
    paths = {row.official: row.ours for row in rows}
    _fill(model, from_official(model, rows, {paths.get(name, name): array for name, array in state_dict.items()}))


def from_official(model: nnx.Module, rows: Iterable[Row], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a model by path, in our layout and of the model's types, from those in the official layout.

    Args:
        model: the model, or a part of one, which may be abstract and stays as it is.
        rows: one for each of its arrays, further ones left aside.
        arrays: in the official layout, by our paths.

    Raises:
        UserError: paths are missing or left over, or shapes differ; lists the first of each by its official name.
    """
    ours, rows = _arrays(model), list(rows)
    by_ours = {row.ours: row for row in rows if row.ours in ours}
    officials = {row.ours: row.official for row in rows}
    # Views without memory show which official shape ours stands for.
    wanted = {
        path: row.layout.to_official(np.broadcast_to(np.int8(0), ours[path].shape)).shape
        for path, row in by_ours.items()
    }
    given = {
        path: _as_matrix(array, wanted.get(path))
        for path, array in arrays.items()
        if not path.endswith("num_batches_tracked")
    }
    named = lambda path: repr(officials.get(path, path))  # noqa: E731
    missing = [named(path) for path in wanted if path not in given]
    unexpected = [named(path) for path in given if path not in wanted]
    differing = [
        f"{named(path)} is {tuple(given[path].shape)} instead of {shape}"
        for path, shape in wanted.items()
        if path in given and tuple(given[path].shape) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in problems.items() if names)
        options = "variant, num_classes and image_size" if "pos_embed" in wanted else "variant and num_classes"
        raise UserError(f"the weights do not fit {type(model).__name__} ({text}); take the {options} they are for")
    return {path: _cast(by_ours[path].layout.to_ours(given[path]), array.dtype) for path, array in ours.items()}


def _fill(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    _, *parts = split(model)
    fill(model, *({path: jnp.asarray(arrays[path]) for path in part} for part in parts))


def _as_matrix(array: np.ndarray, wanted: tuple[int, ...] | None) -> np.ndarray:
    """Take the 1x1 kernel of a convolution for the matrix it is; VMamba's files have some layers in either form."""
    is_kernel = wanted is not None and len(wanted) == 2 and array.ndim == 4 and array.shape[2:] == (1, 1)
    return array[:, :, 0, 0] if is_kernel else array


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a copy in the type of our parameter; float64 stays where JAX has 64 bits enabled."""
    wide = array.dtype == np.float64 and jnp.zeros((), float).dtype == np.float64
    return np.array(array, np.float64 if wide else dtype)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
