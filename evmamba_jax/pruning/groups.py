"""Channels that are pruned with all that is tied to them, and cut out: a smaller dense model with the same logits."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.arrays import split
from evmamba_jax.errors import UserError
from evmamba_jax.layers import channels as layers
from evmamba_jax.layers.channels import Group
from evmamba_jax.pruning.masks import Masks, lowest, zeros_wanted


def channels(model: nnx.Module) -> tuple[Group, ...]:
    """Return the groups of channels that can be cut out of a model; its arrays may be abstract.

    Inner channels of the scans and of the perceptrons, and whole heads of attention.

    Raises:
        UserError: the model has none.
    """
    found = layers.groups(model)
    if not found:
        raise UserError(f"{type(model).__name__} has no channels that can be cut: prune weights instead")
    return found


def channel_scores(params: Mapping[str, jax.Array], groups: Sequence[Group]) -> dict[str, jax.Array]:
    """Return what each channel is worth, (size,) by the group's name.

    The mean, over the arrays of a group that are weights, of the sum of squares of what belongs to the channel.

    Args:
        params: by path; or scores of their entries.
        groups: of :func:`channels`.

    Source: the group norm of Fang et al., DepGraph (arXiv:2301.12900).
    """
    scores = {}
    for group in groups:
        weights = [member for member in group.members if member.weight]
        parts = []
        for member in weights:
            own = jnp.take(params[member.path], member.places(np.arange(group.size)), axis=member.axis)
            others = tuple(axis for axis in range(own.ndim) if axis != member.axis)
            parts.append(jnp.square(own).sum(others).reshape(group.size, member.span).sum(1))
        scores[group.name] = sum(parts[1:], parts[0]) / len(parts)
    return scores


def select_channels(
    scores: Mapping[str, jax.Array],
    sparsity: float,
    kept: Mapping[str, jax.Array] | None = None,
    *,
    scope: str = "layer",
    multiple_of: int = 1,
) -> dict[str, jax.Array]:
    """Return which channels stay, bool (size,) by the group's name; the lowest scores go.

    Args:
        scores: of :func:`channel_scores`.
        sparsity: share of channels that go.
        kept: those that stayed earlier; nothing grows back.
        scope: "layer" ranks each group by itself; "global" all together, each over its group's mean.
        multiple_of: how many stay of a group is rounded up to a multiple of this; with scope "layer" only.

    Raises:
        UserError: as :func:`evmamba_jax.pruning.zeros_wanted`; a multiple with scope "global".
    """
    zeros = channels_wanted(scores, sparsity, scope=scope, multiple_of=multiple_of)
    return lowest_channels(scores, jnp.asarray(zeros, jnp.int32), kept, scope=scope)


def channels_wanted(shapes: Mapping[str, Any], sparsity: float, *, scope: str, multiple_of: int = 1) -> list[int]:
    """Return how many channels go: of each group by sorted names, or of all together; one of each group stays."""
    wanted = zeros_wanted(shapes, sparsity, scope=scope)
    if isinstance(wanted, int):
        if multiple_of != 1:
            raise UserError(f"multiple_of={multiple_of} needs scope='layer': a ranking of all leaves any number")
        return [min(wanted, sum(shape.shape[0] - 1 for shape in shapes.values()))]
    sizes = {name: shapes[name].shape[0] for name in shapes}
    left = {name: max(1, math.ceil((sizes[name] - wanted[name]) / multiple_of)) * multiple_of for name in sizes}
    return [max(0, sizes[name] - left[name]) for name in sorted(sizes)]


def lowest_channels(
    scores: Mapping[str, jax.Array], zeros: jax.Array, kept: Mapping[str, jax.Array] | None = None, *, scope: str
) -> dict[str, jax.Array]:
    """Return which channels stay for a number that may be traced; each group keeps its best channel."""
    ranked = {name: s / jnp.maximum(s.mean(), 1e-30) if scope == "global" else s for name, s in scores.items()}
    ranked = {name: s.at[s.argmax()].set(jnp.inf) for name, s in ranked.items()}
    found = lowest(ranked, zeros, kept, scope=scope)
    return {name: found[name] for name in scores}


def channel_masks(params: Mapping[str, Any], groups: Sequence[Group], kept: Mapping[str, jax.Array]) -> Masks:
    """Return masks over everything that is tied to the channels that go, biases included.

    Args:
        params: by path; shapes will do.
        groups: of :func:`channels`.
        kept: bool (size,) by the group's name; groups that are not named stay whole. May be traced.
    """
    masks: Masks = {}
    for group in groups:
        if group.name not in kept:
            continue
        for member in group.members:
            if member.statistic:
                continue
            shape = tuple(params[member.path].shape)
            places = member.places(np.arange(group.size))
            along = jnp.ones(shape[member.axis], bool).at[places].set(jnp.repeat(kept[group.name], member.span))
            own = jnp.broadcast_to(along.reshape([-1 if i == member.axis else 1 for i in range(len(shape))]), shape)
            masks[member.path] = masks[member.path] & own if member.path in masks else own
    return masks


def kept_channels(masks: Mapping[str, Any], groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Return the channels that masks leave, ascending, by the group's name; groups without a mask are left out.

    Raises:
        UserError: a mask that is False for a part of a channel: the masks are not of whole channels.
    """
    masks = {name: np.asarray(mask) for name, mask in masks.items()}
    dead = {name: np.zeros(mask.shape, bool) for name, mask in masks.items()}
    found = {}
    for group in groups:
        own = [member for member in group.members if member.path in masks]
        if not own:
            continue
        alive = np.zeros(group.size, bool)
        for member in own:
            along = np.moveaxis(masks[member.path], member.axis, 0)[member.places(np.arange(group.size))]
            alive |= along.reshape(group.size, -1).any(1)
        found[group.name] = np.flatnonzero(alive)
        for member in own:
            places = member.places(np.flatnonzero(~alive))
            np.moveaxis(dead[member.path], member.axis, 0)[places] = True
    for name, mask in masks.items():
        if (mask == dead[name]).any():
            raise UserError(
                f"the mask of {name} prunes single weights, which cannot be cut: only whole channels can, as "
                "config.pruning.structure=channels prunes them"
            )
    return found


def cut(model: Any, masks: Mapping[str, Any]) -> Any:
    """Return a smaller dense model without the channels that masks leave out; its logits are the masked model's.

    Args:
        model: with zeros where the masks are False; it stays as it is. Its arrays may be abstract.
        masks: of whole channels, by path.

    Returns:
        A model of the same class, whose ``config.inner`` says what is left: ``create_model(name, inner=...)`` builds
        such a one.

    Raises:
        UserError: masks of single weights, or of another model.
    """
    params = split(model).params
    for name, mask in masks.items():
        if name not in params or tuple(np.shape(mask)) != tuple(params[name].shape):
            raise UserError(f"the mask of {name} fits no parameter here: the masks are of another model")
    kept = kept_channels(masks, channels(model))
    smaller: Any = nnx.clone(model)
    layers.keep(smaller, kept)
    left = {group.name: group.size for group in layers.groups(smaller)}
    whole = dict(model.config.inner) | {name: left[name] for name in kept}
    smaller.config = dataclasses.replace(model.config, inner=tuple(sorted(whole.items())))
    return smaller


def zero_channels(params: Mapping[str, Any], groups: Sequence[Group]) -> Masks:
    """Return the masks of the channels that are zero in everything that has them; none where there is no such channel.

    Args:
        params: by path.
        groups: of :func:`channels`.
    """
    alive = {group.name: alive_channels(params, group) for group in groups}
    return channel_masks(params, groups, {name: kept for name, kept in alive.items() if kept.any() and not kept.all()})


def alive_channels(params: Mapping[str, Any], group: Group) -> jax.Array:
    """Return which channels of a group are not zero everywhere, bool (size,); may be traced."""
    alive = jnp.zeros(group.size, bool)
    for member in group.members:
        if not member.statistic:
            own = jnp.moveaxis(jnp.asarray(params[member.path]), member.axis, 0)[member.places(np.arange(group.size))]
            alive |= (own.reshape(group.size, -1) != 0).any(1)
    return alive
