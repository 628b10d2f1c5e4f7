"""Weights, whichever way they are kept: in a file of the official code, or in a folder of ours."""

from os import PathLike
from typing import Any

import numpy as np
from etils import epath

from evmamba_jax.arrays import fill, merge, split
from evmamba_jax.checkpoints import load_meta
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.models.registry import for_classes, load_pretrained
from evmamba_jax.weights.convert import count_classes, from_torch
from evmamba_jax.weights.torch_file import load_torch_file


def is_folder(source: str | PathLike[str]) -> bool:
    """Return whether weights lie in a folder of ours (True) or in a file of the official code (False).

    Raises:
        UserError: there is neither.
    """
    place = epath.Path(source).expanduser()
    if not place.exists():
        raise UserError(
            f"{str(source)!r} does not exist; give a file of official weights (.pth, .pth.tar, .ckpt, .bin, "
            ".safetensors), or the folder of a converted model, of a training run, or of one of its checkpoints"
        )
    return place.is_dir()


def load_weights(
    model: Any, source: str | PathLike[str], name: str, *, ema: bool = False, fine_tune: bool = False
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return parameters, batch statistics and meta of a folder or file as a model takes them.

    Args:
        model: the model, which may be abstract and stays as it is.
        source: the folder of a converted model, of a training run, or of one of its checkpoints; or a file of official
            weights, of whose parts :func:`load_torch_file` takes the first that it knows.
        name: what an error calls the model.
        ema: take the moving average, which a folder has where its meta says so, and a file never.
        fine_tune: also take weights for another number of classes, whose head is then left out of what is returned;
            and of a file Vim's position embedding of another grid, as :func:`from_torch` resizes it. A folder may
            always be of another grid.

    Returns:
        NumPy arrays by path, twice, and the meta of a folder's checkpoint (empty for a file).

    Raises:
        UserError: nothing is there; it is damaged or foreign; it is for another model or, without ``fine_tune``, for
            another number of classes.
    """
    if is_folder(source):
        return load_pretrained(model, source, name, ema=ema, new_head=fine_tune)
    filled = _filled_from_file(merge(*split(model)), source, _read(source), name, fine_tune)
    _, *arrays = split(filled)
    params, batch_stats = ({path: np.asarray(array) for path, array in part.items()} for part in arrays)
    return params, batch_stats, {}


def open_model(source: str | PathLike[str], name: str = "") -> tuple[Any, str, dict[str, Any]]:
    """Build the model that a folder or file holds the weights of: its sizes and its number of classes are read off.

    Of a training run the moving average is taken where there is one.

    Args:
        source: as for :func:`load_weights`.
        name: one of :func:`evmamba_jax.list_models`; a folder may be without, where its meta has it.

    Returns:
        The model, in evaluation mode; its name; and the meta of a folder's checkpoint (empty for a file).

    Raises:
        UserError: the name is missing or unknown, or another one than the folder's; otherwise as ``load_weights``.
    """
    meta = load_meta(source) if is_folder(source) else {}
    stated = meta.get("model", "")
    if not name and not stated:
        raise UserError(f"{source} does not say which model it is of; name it, e.g. --model evmamba_t")
    if name and stated and name != stated:
        raise UserError(f"{source} holds the weights of {stated}, not of {name}")
    name = name or stated
    if is_folder(source):
        options = dict(meta.get("options", {}))  # of a converted model
        if "config" in meta:  # of a run
            run = meta["config"]
            options = {"num_classes": meta["num_classes"], "in_channels": run["data"]["in_channels"]}
            options |= run["model"]["options"]
        model = abstract_model(name, **options)
        params, batch_stats, _ = load_pretrained(model, source, name, ema=bool(meta.get("ema")))
        fill(model, params, batch_stats)
        return model, name, meta
    official = _read(source)
    classes = count_classes(abstract_model(name), official)
    model = abstract_model(name, **({} if classes is None else {"num_classes": classes}))
    return _filled_from_file(model, source, official, name, fine_tune=False), name, meta


def _read(source: str | PathLike[str]) -> dict[str, np.ndarray]:
    return load_torch_file(epath.Path(source).expanduser())


def _filled_from_file(
    model: Any, source: str | PathLike[str], official: dict[str, np.ndarray], name: str, fine_tune: bool
) -> Any:
    classes = count_classes(model, official)
    model = for_classes(model, classes, str(source), f"model {name}", new_head=fine_tune)
    try:
        from_torch(model, official, resize=fine_tune)
    except UserError as error:
        raise UserError(f"{source} does not fit model {name}: {error}") from error
    return model
