"""The door for all weights: read them from their place, rename them, fit them to a model.

A place is one of six:

- a file of the official code (.pth, .pth.tar, .ckpt, .bin, .safetensors);
- the folder of a converted model;
- the work folder of a training run, which stands for its newest whole checkpoint, with early stopping for its best;
- one of its checkpoints;
- ``hf-hub:owner/name[@revision]``, a repository of the hub that holds one of these;
- ``official``, the released file of the model's card, from a cache or from where it is published.

The same rules hold for each: which shapes may differ (``fit.py``), whether parameters or moving average are taken, and
a line that says so.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from evmamba_jax import checkpoints, lora
from evmamba_jax.arrays import Variables, check_same_shapes, fill, split
from evmamba_jax.checkpoints import Saved
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.storage import is_bucket, local
from evmamba_jax.weights import places
from evmamba_jax.weights.convert import by_path, from_official, table
from evmamba_jax.weights.fit import fit_body, fit_head, fit_stem, other_classes
from evmamba_jax.weights.torch_file import read_torch_file

logger = logging.getLogger(__name__)

Ema = bool | Literal["better"]
EMA_WORDS: dict[str, Ema] = {"better": "better", "yes": True, "no": False}  # for command lines

# "upernet:vmamba_t" is the name of UperNet over VMamba-T. In a run's configuration one of these parts has the heads.
SEPARATOR, PARTS = ":", ("segmenter", "detector")

_TAKEN = {False: "parameters", True: "moving average"}


class Weights(NamedTuple):
    """What a place gives to a model.

    Attributes:
        params: NumPy arrays by path.
        batch_stats: the same of the batch statistics.
        meta: what a checkpoint says of itself; empty for an official file.
        place: the file or the folder of the checkpoint.
        part: parameters, moving average, or an entry of the file, in words; empty where there is no choice.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    meta: dict[str, Any]
    place: str
    part: str

    @property
    def variables(self) -> Variables:
        """Both dictionaries as one pytree."""
        return Variables(self.params, self.batch_stats)

    @property
    def taken(self) -> str:
        """What was taken, in words, e.g. "runs/digits/checkpoints/300, moving average (top-1 98.9 against 98.1)"."""
        return f"{self.place}, {self.part}" if self.part else self.place


class Opened(NamedTuple):
    """A model with the weights of a place.

    Attributes:
        model: in evaluation mode.
        name: of the model.
        options: what ``create_model(name, **options)`` makes such a model of.
        weights: as they came.
    """

    model: Any
    name: str
    options: dict[str, Any]
    weights: Weights


def load_weights(
    model: Any,
    place: str | PathLike[str],
    name: str,
    *,
    variant: str = "",
    ema: Ema = "better",
    initial: Callable[[], nnx.Module] | None = None,
) -> Weights:
    """Return the weights of a place as a model takes them.

    Args:
        model: the model, which may be abstract and stays as it is.
        place: see the module.
        name: what a message calls the model.
        variant: its registered name, which the place ``official`` needs.
        ema: False takes the parameters of a run, True their moving average. "better" takes what the checkpoint's own
            evaluation found better; in a tie, and without an evaluation of both at this step, the parameters.
        initial: builds the model with fresh initial values; give it to train on. Weights for another number of classes
            then get the initial head, and Vim's position embedding of another grid is resized; a line says so. Leave it
            out to evaluate: both are then refused.

    Raises:
        UserError: nothing is there; it is damaged or foreign; it does not fit the model; it has no moving average.
    """
    return _fitted(model, _read(place, ema, variant), f"model {name}", initial)


def load_composed(
    model: Any,
    place: str | PathLike[str],
    name: str,
    *,
    backbone: str,
    ema: Ema = "better",
    key: str | None = None,
    layers: Sequence[str] = (),
    initial: Callable[[], nnx.Module] | None = None,
) -> tuple[Any, Weights]:
    """Return the part of a segmenter or detector that a place has weights for, and these.

    Args:
        model: the model; ``model.backbone`` is its backbone. It stays as it is.
        place: see the module; of a whole model, or of a classifier.
        name: what a message calls the model.
        backbone: the registered name of its backbone, whose released file the place ``official`` is.
        ema: as for :func:`load_weights`.
        key: the entry of an official file to take, as for :func:`load_torch_file`.
        layers: paths of the layers that tell classes.
        initial: builds the model with fresh initial values; give it to train on. These layers then have its values
            where the weights are for another number of classes; a line says so. Otherwise such weights are refused.

    Returns:
        The model with weights for all of it, or its backbone with those of a classifier.

    Raises:
        UserError: as ``load_weights``.
    """
    found = _read(place, ema, backbone, key)
    if not any(path.startswith("backbone.") for path in found.arrays):
        # Vim's position embedding is resized as for fine-tuning: the segmenter's images have another size.
        return model.backbone, _fitted(model.backbone, found, f"backbone {backbone}", lambda: model.backbone)
    arrays = by_path(model, found.arrays) if found.official else found.arrays
    anew = other_classes(model, arrays, layers) if initial is not None else []
    if anew and initial is not None:
        logger.warning(f"{found.given} tells other classes apart: the layers of {name} that tell them start anew")
        fresh = split(initial()).params
        layouts = {row.ours: row.layout for row in table(model)} if found.official else {}
        started = {path: np.asarray(fresh[path]) for path in anew}
        started = {path: layouts[path].to_official(a) if path in layouts else a for path, a in started.items()}
        arrays = {**arrays, **started}
    return model, _as_wanted(model, arrays, found, name)


def open_model(source: str | PathLike[str], name: str = "", *, ema: Ema = "better") -> tuple[Any, str, dict[str, Any]]:
    """Build the model of a place: the place tells its sizes and its number of classes.

    Args:
        source: the place; see the module.
        name: one of :func:`evmamba_jax.list_models`; not needed for a folder whose meta has it.
        ema: as for :func:`load_weights`.

    Returns:
        The model, in evaluation mode; its name; and the meta of a folder's checkpoint (empty for a file).

    Raises:
        UserError: the name is missing or unknown, or another one than the folder's; otherwise as ``load_weights``.
    """
    opened = open_place(source, name, ema=ema)
    return opened.model, opened.name, opened.weights.meta


def open_place(
    place: str | PathLike[str], name: str = "", *, ema: Ema = "better", key: str | None = None, **options: Any
) -> Opened:
    """Build the model of a place as :func:`open_model` does, and say what was taken.

    Args:
        place: see the module.
        name: of the model; not needed for a folder whose meta has it.
        ema: as for :func:`load_weights`.
        key: the entry of an official file to take, as for :func:`load_torch_file`.
        **options: of the model; the place's own and the published ones hold for the rest.

    Raises:
        UserError: as ``open_model``.
    """
    found = _read(place, ema, name, key)
    stated = stated_name(found.meta)
    if SEPARATOR in stated:
        head, _, backbone = stated.partition(SEPARATOR)
        raise UserError(f"{place} holds {head} with {backbone}, no classifier: predict with it, or name other weights")
    if not name and not stated:
        raise UserError(f"{place} does not say which model it is of; name it, e.g. --model evmamba_t")
    if name and stated and name != stated:
        raise UserError(f"{place} holds the weights of {stated}, not of {name}")
    name = name or stated
    options = _stated_options(found.meta) | options
    model = abstract_model(name, **options)
    if "num_classes" not in options and model.head is not None:
        bias = (by_path(model, found.arrays) if found.official else found.arrays).get("head.bias")
        if bias is not None and bias.size != model.head.bias.get_value().size:
            options["num_classes"] = bias.size
            model = abstract_model(name, **options)
    weights = _fitted(model, found, f"model {name}", None)
    fill_model(model, weights)
    return Opened(model, name, options, weights)


def stated_name(meta: Mapping[str, Any]) -> str:
    """Return the name of the model that a checkpoint's meta states, with its heads if it has any; empty if none is."""
    config = meta.get("config", {})
    heads = [config[part]["name"] for part in PARTS if part in config]
    return SEPARATOR.join([*heads, config["model"]["name"]]) if heads else meta.get("model", "")


def meta_of(place: str | PathLike[str], name: str = "") -> dict[str, Any]:
    """Return what the checkpoint of a place says of itself; empty for a file, or where nothing is.

    Args:
        place: see the module.
        name: of the model, whose released file the place ``official`` is.

    Raises:
        UserError: it cannot be fetched; a folder without a whole checkpoint.
    """
    path = places.resolve(place, name).path
    folder = epath.Path(path if is_bucket(path) else local(path))
    return checkpoints.find(folder).meta if folder.is_dir() else {}


def is_composed(place: str | PathLike[str], name: str = "") -> bool:
    """Return whether the name of a model, or else a place, is of a backbone with heads; errors as ``meta_of``."""
    return SEPARATOR in (name or stated_name(meta_of(place)))


def official_lengths(place: str | PathLike[str], name: str = "", key: str | None = None) -> dict[str, int]:
    """Return the length of every array with one axis in a place, by the official name; empty for a folder.

    Args:
        place: see the module.
        name: of the model, whose released file the place ``official`` is.
        key: the entry of the file to take, as for :func:`load_torch_file`.

    Raises:
        UserError: as ``load_weights``.
    """
    found = _read(place, False, name, key)
    return {path: array.size for path, array in found.arrays.items() if array.ndim == 1} if found.official else {}


def inner_of(place: str | PathLike[str], name: str = "") -> dict[str, Any]:
    """Return the option ``inner`` of a model whose channels were cut, as a dictionary; empty for any other place.

    What a cut leaves belongs to the weights, not to who asks for them.
    """
    inner = _stated_options(meta_of(place, name)).get("inner")
    return {"inner": tuple((group, size) for group, size in inner)} if inner else {}


def fill_model(model: Any, weights: Weights) -> None:
    """Put weights into a model."""
    fill(model, *jax.tree.map(jnp.asarray, weights[:2]))


class _Found(NamedTuple):
    """What lies in a place, before it is fitted to a model."""

    arrays: dict[str, np.ndarray]  # by official names, or by our paths
    official: bool
    meta: dict[str, Any]
    given: str  # what a message calls it
    place: str
    part: str


def _read(given: str | PathLike[str], ema: Ema, name: str, key: str | None = None) -> _Found:
    if ema not in (True, False, "better"):
        raise UserError(f"ema is {ema!r}; allowed: True, False or 'better'")
    place, told = places.resolve(given, name)
    path = epath.Path(place if is_bucket(place) else local(place))
    try:
        exists = path.exists()
    except Exception as error:  # of whatever library reads that kind of bucket, or lacks for it
        raise UserError(
            f"{place} cannot be read from here ({' '.join(str(error).split())[:200]}); copy it to a disk first"
        ) from error
    if not exists:
        raise UserError(
            f"{str(place)!r} does not exist; give a file of official weights (.pth, .pth.tar, .ckpt, .bin, "
            ".safetensors), the folder of a converted model, of a training run, or of one of its checkpoints; "
            "hf-hub:owner/name; or official"
        )
    if not path.is_dir():
        arrays, entry = read_torch_file(place, key=key, average=ema is True)
        return _Found(arrays, True, {}, told, told, f"entry {entry!r}" if entry else "")
    if key is not None:
        raise UserError(f"key {key!r} was given, but {place} is a folder, which has no entries; omit it")
    saved = checkpoints.find(path)
    average, part = _choice(saved, ema)
    params, batch_stats = saved.read(ema=average)
    params = lora.merged(params)
    below = saved.folder.relative_to(path).as_posix()
    step = told if below == "." else f"{told.rstrip('/')}/{below}"
    return _Found({**params, **batch_stats}, False, saved.meta, f"checkpoint {told}", step, part)


def average_is_better(figures: Mapping[str, float], figure: str, higher: bool) -> bool:
    """Return whether an evaluation found the moving average better than the parameters: not in a tie.

    Args:
        figures: metrics by name; the average's have ``ema_`` before their names.
        figure: the name of the metric that decides.
        higher: whether more of it is better.
    """
    if f"ema_{figure}" not in figures:
        return False
    own, average = ((figures[name] if higher else -figures[name]) for name in (figure, f"ema_{figure}"))
    return average > own or (math.isnan(own) and not math.isnan(average))


def _choice(saved: Saved, ema: Ema) -> tuple[bool, str]:
    """Return whether the moving average is taken, and the part in words."""
    meta = saved.meta
    if not saved.has_ema and ema is not True:
        return False, ""
    if ema != "better":
        return ema, _TAKEN[ema]
    chooses = meta.get("chooses", {"figure": "top1", "higher": True})
    figure, figures, evaluated = chooses["figure"], meta.get("figures", {}), meta.get("evaluated")
    both = [figures.get(name) for name in (figure, f"ema_{figure}")]
    if None in both or evaluated is None or evaluated != meta.get("step"):
        return False, f"{_TAKEN[False]} (not evaluated at this step)"
    better = average_is_better(figures, **chooses)
    spoken = {"top1": "top-1", "top5": "top-5"}.get(figure, figure.replace("_", " "))
    return better, f"{_TAKEN[better]} ({spoken} {both[better]:.4g} against {both[not better]:.4g})"


def _stated_options(meta: dict[str, Any]) -> dict[str, Any]:
    options = {}
    if "config" in meta:  # of a run
        run = meta["config"]
        options = {"in_channels": run["data"]["in_channels"], **run["model"]["options"]}
        if "num_classes" in meta:
            options["num_classes"] = meta["num_classes"]
    return options | meta.get("options", {})  # of a converted model


def _fitted(model: Any, found: _Found, name: str, initial: Callable[[], nnx.Module] | None) -> Weights:
    arrays = by_path(model, found.arrays) if found.official else found.arrays
    arrays, adapted = fit_stem(model, arrays, found.given, official=found.official)
    if adapted:
        logger.warning(adapted)
    body, note = fit_head(model, arrays, found.given, name, fine_tune=initial is not None)
    weights = _as_wanted(body, fit_body(body, arrays, resize=initial is not None), found, name)
    if note and initial is not None:
        logger.warning(note)
        fresh = split(initial()).params
        added = {path: np.asarray(array) for path, array in fresh.items() if path not in weights.params}
        weights = weights._replace(params=weights.params | added)
    return weights


def _as_wanted(model: Any, arrays: Mapping[str, Any], found: _Found, name: str) -> Weights:
    """Return arrays by path in the model's layout and types, or refuse them."""
    _, *wanted = split(model)
    if found.official:
        try:
            arrays = from_official(model, table(model), arrays)
        except UserError as error:
            raise UserError(f"{found.given} does not fit {name}: {error}") from error
    else:
        check_same_shapes({**wanted[0], **wanted[1]}, dict(arrays), found.given, name)
    params, batch_stats = ({path: np.asarray(arrays[path]) for path in part} for part in wanted)
    return Weights(params, batch_stats, found.meta, found.place, found.part)
