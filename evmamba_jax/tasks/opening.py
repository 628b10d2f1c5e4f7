"""Segmenters and detectors from a place: a run, a converted model, or a file of official weights.

An official file does not say what it is of, so a name does: ``upernet:vmamba_t`` is UperNet over VMamba-T. Its
classes and widths are read off the file.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from evmamba_jax.arrays import merge, split
from evmamba_jax.config import Config
from evmamba_jax.data.coco_json import coco_categories
from evmamba_jax.errors import UserError, nearest, one_of
from evmamba_jax.layers.backbone import PlainConfig
from evmamba_jax.models.registry import configuration
from evmamba_jax.ranges import plain
from evmamba_jax.segmentation.ade20k import ade20k_classes
from evmamba_jax.tasks.composed import Composed
from evmamba_jax.tasks.registry import kind_of, task_of
from evmamba_jax.weights import Weights
from evmamba_jax.weights.detectors import RETINANET_SIZES, VIM_SIZES, rcnn_sizes
from evmamba_jax.weights.load import SEPARATOR, Ema, fill_model, meta_of, official_lengths, stated_name
from evmamba_jax.weights.upernet import SIZES


class Heads(NamedTuple):
    """What is known of heads by their name.

    Attributes:
        task: that they are for.
        sizes: options that an official file tells: an array, and what its length is divided by.
        known: the classes of the data set that the official models are for.
    """

    task: str
    sizes: Mapping[str, tuple[str, int]]
    known: Callable[[], Sequence[str]]


HEADS = {
    "upernet": Heads("segmentation", SIZES, ade20k_classes),
    "retinanet": Heads("detection", RETINANET_SIZES, lambda: coco_categories().names),
    "mask_rcnn": Heads("detection", rcnn_sizes(), lambda: coco_categories().names),
    "cascade_mask_rcnn": Heads("detection", rcnn_sizes(".0"), lambda: coco_categories().names),
    "vim_cascade": Heads("detection", VIM_SIZES, lambda: coco_categories().names),
}


class OpenedTask(NamedTuple):
    """A segmenter or detector with weights.

    Attributes:
        task: with the configuration.
        model: in evaluation mode.
        name: such as "upernet:vmamba_t".
        weights: as they came; their meta is as a run's, whatever the place.
    """

    task: Composed
    model: Any
    name: str
    weights: Weights


def open_composed(
    place: str | PathLike[str],
    name: str = "",
    *,
    ema: Ema = "better",
    key: str | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> OpenedTask:
    """Build the segmenter or detector of a place.

    Args:
        place: as for :func:`evmamba_jax.weights.load_weights`.
        name: such as "upernet:vmamba_t"; not needed for a folder, which names it.
        ema: as for ``load_weights``.
        key: the entry of an official file to take, as for ``load_torch_file``.
        class_names: one a class, where the place has others; not given and not in the place, ADE20K's 150 of a
            segmenter, COCO's 80 of a detector, or numbers.
        **options: ``num_classes``, and fields of what the configuration says of the heads, as "width". With a prefix,
            as in "backbone.width", of the backbone, or as in "data.scale", of the data. The place's own hold for the
            rest.

    Raises:
        UserError: another name than the place's; an unknown one; an unknown option; names that are too many or too few;
            otherwise as ``load_weights``.
    """
    meta = meta_of(place, name.partition(SEPARATOR)[2])
    stated = stated_name(meta)
    if name and stated and name != stated:
        raise UserError(f"{place} holds the weights of {stated}, not of {name}")
    name = name or stated
    head, _, backbone = name.partition(SEPARATOR)
    heads = one_of("head", head, HEADS)
    kind: Any = kind_of(heads.task)
    if stated:
        config, found = of_json(kind.needs, meta["config"]), {"num_classes": meta["num_classes"]}
    else:
        config, lengths = _fresh(kind, head, backbone), official_lengths(place, backbone, key)
        found = {option: lengths[array] // share for option, (array, share) in heads.sizes.items() if array in lengths}
    config.eval_only = True
    found |= options
    if "num_classes" not in found:
        raise UserError(f"{place} holds no {name}: there is no array {heads.sizes['num_classes'][0]!r} in it")
    classes = found.pop("num_classes")
    _set(config, kind.part, found)
    known = heads.known()
    names = class_names or meta.get("class_names") or (known if len(known) == classes else range(classes))
    if len(names) != classes:
        raise UserError(f"there are {len(names)} names of classes, but {place} tells {classes} classes apart")
    task = task_of(config)(config, tuple(map(str, names)))
    assert isinstance(task, Composed)
    weights = task.load(place, ema=ema, key=key)
    told = {"model": name, "config": json.loads(config.to_json()), **task.meta()}
    model = merge(*split(task.model))
    fill_model(model, weights)
    return OpenedTask(task, model, name, weights._replace(meta=weights.meta | told))


def _fresh(kind: Any, head: str, backbone: str) -> Config:
    """Return the configuration of an official model: of a backbone like Vim as the official segmenters test it."""
    config = kind.needs()
    config.model.name, config.model.dtype, config.model.drop_path_rate = backbone, "float32", 0.0
    getattr(config, kind.part).name = head
    if isinstance(configuration(backbone), PlainConfig) and kind.part == "segmenter":
        config.model.options, config.data.test = {"image_size": config.data.image_size}, "slide"
    return config


def _set(config: Config, part: str, options: Mapping[str, Any]) -> None:
    """Set options in a configuration; see ``open_composed``."""
    heads: Any = getattr(config, part)
    for name, value in options.items():
        place, dot, field = name.partition(".")
        if dot and place == "backbone":
            config.model.options = {**config.model.options, field: value}
            continue
        target, field = (config.data, field) if dot and place == "data" else (heads, name)
        known = [one.name for one in dataclasses.fields(target) if one.name != "name"]
        if field not in known:
            raise UserError(
                f"unknown option {name!r}{nearest(field, known)}; allowed: num_classes, {', '.join(known)}"
                + ("" if target is config.data else ", backbone.NAME and data.NAME")
            )
        setattr(target, field, value)


def of_json(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Return the configuration that a checkpoint's meta has; older ones lack fields, which then have their defaults."""
    config = kind()
    _fill(config, values)
    return config


def _fill(target: Any, values: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(target):
        if field.name in values:
            own, value = getattr(target, field.name), values[field.name]
            if dataclasses.is_dataclass(own):
                _fill(own, value)
            else:
                setattr(target, field.name, plain(value))
