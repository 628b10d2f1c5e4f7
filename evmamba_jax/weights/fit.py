"""Which weights may have other shapes than a model's, and what happens to them. No other place decides this.

- A model without a head takes a classifier and leaves its head out.
- A backbone (``out_norms=True``) takes a classifier as the official detectors do: it leaves the last norm out too, and
  its out norms keep their initial 1 and 0. Vim's backbone (``class_token=False``) leaves the class token out, that of
  its detector the last norm too.
- To train on, a model also takes weights for another number of classes, and starts its head anew. Of a segmenter or
  detector the layers that tell classes start anew. Vim takes a position embedding of another grid of patches, and
  resizes it.

- A model for other images than RGB takes a stem for RGB, summed or repeated.

All else must have the same shape.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evmamba_jax.arrays import merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.layers.backbone import StagedBackbone
from evmamba_jax.models.vim import CLASS_TOKEN_AT, Vim, resize_pos_embed

logger = logging.getLogger(__name__)


def fit_head(model: Any, arrays: Mapping[str, Any], given: str, name: str, *, fine_tune: bool) -> tuple[Any, str]:
    """Return the model as it takes a head, itself or without its own where that starts anew, and the line for that.

    Args:
        model: the model, which may be abstract and stays as it is.
        arrays: the weights, by path.
        given: what a message calls them.
        name: what a message calls the model.
        fine_tune: whether the head may start anew.

    Raises:
        UserError: the weights are for another number of classes, and ``fine_tune`` is not set.
    """
    classes = arrays["head.bias"].size if "head.bias" in arrays else None
    wanted = None if model.head is None else model.head.bias.get_value().size
    if wanted is None or classes == wanted or (classes is None and not fine_tune):
        return model, ""
    if not fine_tune:
        raise UserError(f"{given} has {classes} classes and {name} has {wanted}; the two must be the same")
    headless = merge(*split(model))
    headless.head = None
    has = "no head" if classes is None else f"{classes} classes"
    return headless, f"{given} has {has}: the head of {name}, with {wanted}, starts anew"


def other_classes(model: Any, arrays: Mapping[str, Any], layers: Sequence[str]) -> list[str]:
    """Return the paths of the layers that tell a segmenter's or detector's classes, where weights have others.

    Args:
        model: the model, which may be abstract.
        arrays: the weights, by path.
        layers: the paths of these layers, each with a kernel and a bias.
    """
    wanted = split(model).params
    biases = [f"{layer}.bias" for layer in layers]
    differing = any(path in arrays and arrays[path].shape != wanted[path].shape for path in biases)
    return [f"{layer}.{name}" for layer in layers for name in ("kernel", "bias")] if differing else []


def fit_stem(model: Any, arrays: Mapping[str, Any], given: str, *, official: bool) -> tuple[dict[str, Any], str]:
    """Return weights for RGB images as a model for other images takes them, and the line that says so.

    For one channel the stem's three are added up, which is what a grey image seen as RGB gives. For others they are
    repeated and made smaller by the same factor, so that the sum over channels keeps its size.

    Args:
        model: the model, which may be abstract.
        arrays: the weights, by path.
        given: what a message calls them.
        official: whether kernels are (O, I, H, W), the official layout, and not (H, W, I, O).

    Source: timm's ``adapt_input_conv``.
    """
    channels, axis, fitted = model.in_channels, 1 if official else 2, dict(arrays)
    wanted = split(model).params
    for path, array in arrays.items():
        stem = path in wanted and len(wanted[path].shape) == 4 and wanted[path].shape[2] == channels != 3
        if not stem or array.ndim != 4 or array.shape[axis] != 3:
            continue
        if channels == 1:
            fitted[path] = array.sum(axis, keepdims=True)
            return fitted, f"{given} is for 3 channels: the stem's are added up for one"
        repeated = np.concatenate([array] * math.ceil(channels / 3), axis).take(range(channels), axis)
        fitted[path] = (repeated * np.float32(3 / channels)).astype(array.dtype)
        return fitted, f"{given} is for 3 channels: the stem's are repeated for {channels}, times 3/{channels}"
    return fitted, ""


def fit_body(model: Any, arrays: Mapping[str, Any], *, resize: bool) -> dict[str, Any]:
    """Return weights, by path, as a model takes them: without what it has no place for.

    Args:
        model: the model, which may be abstract and stays as it is.
        arrays: the weights; of Vim's in either layout, as ours and the official one are the same here.
        resize: resize a position embedding of another length, which is taken for a square grid's.
    """
    if model.head is None:
        arrays = {path: array for path, array in arrays.items() if not path.startswith("head.")}
    if isinstance(model, Vim):
        if model.norm is None:
            arrays = {path: array for path, array in arrays.items() if not path.startswith("norm.")}
        return _position_embedding(model, arrays, resize)
    if (
        not isinstance(model, StagedBackbone)
        or model.out_norms is None
        or any(path.startswith("out_norms.") for path in arrays)
    ):
        return dict(arrays)
    kept = {path: array for path, array in arrays.items() if not path.startswith("norm.")}
    for i, norm in enumerate(model.out_norms):
        kept[f"out_norms.{i}.scale"] = np.ones(norm.num_features, np.float32)
        kept[f"out_norms.{i}.bias"] = np.zeros(norm.num_features, np.float32)
    return kept


def _position_embedding(model: Vim, arrays: Mapping[str, Any], resize: bool) -> dict[str, Any]:
    given = arrays.get("pos_embed")
    if given is None or given.ndim != 3:
        return dict(arrays)
    classifier, patches = "cls_token" in arrays, model.config.grid[0] * model.config.grid[1]
    if resize and given.shape[1] != patches + classifier:
        side = math.isqrt(given.shape[1] - classifier)
        if given.shape[1] == side**2 + classifier:
            logger.warning("position embedding resized from %dx%d to %dx%d patches", side, side, *model.config.grid)
            place = model.config.pos_embed_class_token if classifier else None
            given = np.asarray(resize_pos_embed(given, (side, side), model.config.grid, class_token=place))
    if classifier and model.cls_token is None and model.head is None and given.shape[1] == patches + classifier:
        arrays = {path: array for path, array in arrays.items() if path != "cls_token"}
        given = np.delete(given, CLASS_TOKEN_AT[model.config.pos_embed_class_token](patches), axis=1)
    return {**arrays, "pos_embed": given}
