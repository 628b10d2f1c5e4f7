"""Channels within a block that can go for good, with everything that is tied to them.

A layer that has such channels says so: ``channel_groups()`` returns its groups. All of a group's members have the
channel, each in a place of its own; without them in all of them the layer is a smaller one of the same kind.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.errors import UserError, nearest


class Member(NamedTuple):
    """One array's share of a group: channel e lies at ``offset + e * span`` of an axis, ``span`` entries wide.

    Attributes:
        path: of the array, from the layer and, in a model's groups, from the model.
        axis: of the channels.
        offset: where channel 0 begins.
        span: entries of a channel.
        weight: whether the array is a weight matrix or a kernel, by which channels are judged.
        statistic: whether the array is one of the batch statistics and no parameter.
    """

    path: str
    axis: int
    offset: int = 0
    span: int = 1
    weight: bool = False
    statistic: bool = False

    def places(self, channels: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return where these channels lie on the axis."""
        first = self.offset + np.asarray(channels, np.int64)[:, None] * self.span
        return (first + np.arange(self.span)).ravel()


class Group(NamedTuple):
    """Channels that are tied.

    Attributes:
        name: of the layer within the model, and which of its groups where it has several.
        size: how many channels.
        members: everything that has them.
    """

    name: str
    size: int
    members: tuple[Member, ...]


def scan_members(path: str) -> tuple[Member, ...]:
    """Return the members of a scan (:class:`evmamba_jax.layers.s6.S6`), all of its sets of parameters."""
    weights = Member(f"{path}.x_proj", 1, weight=True), Member(f"{path}.dt_proj", 2, weight=True)
    return (*weights, *(Member(f"{path}.{name}", 1) for name in ("dt_bias", "A_log", "D")))


def conv_members(path: str, layer: nnx.Conv) -> tuple[Member, ...]:
    """Return the members of a depthwise convolution."""
    kernel = Member(f"{path}.kernel", len(layer.kernel.shape) - 1, weight=True)
    return (kernel,) if layer.bias is None else (kernel, Member(f"{path}.bias", 0))


def groups(model: nnx.Module) -> tuple[Group, ...]:
    """Return the groups of all layers of a model, in the order of its layers."""
    found = []
    for path, module in nnx.iter_modules(model):
        prefix = ".".join(map(str, path))
        for name, size, members in getattr(module, "channel_groups", tuple)():
            whole = tuple(member._replace(path=f"{prefix}.{member.path}") for member in members)
            found.append(Group(f"{prefix}.{name}" if name else prefix, size, whole))
    return tuple(sorted(found, key=lambda group: [int(p) if p.isdigit() else p for p in group.name.split(".")]))


def keep(model: nnx.Module, kept: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """Cut a model in place down to some channels of some groups.

    Args:
        model: its arrays may be abstract.
        kept: channels by the group's name, ascending; groups that are not named stay whole.

    Raises:
        UserError: a name that is no group's, channels that the group has not, none left.
    """
    known = {group.name: group for group in groups(model)}
    gone: dict[tuple[str, int], set[int]] = {}  # places by array and axis: an array may be a member more than once
    for name, channels in kept.items():
        if name not in known:
            raise UserError(f"{name!r} is no group of channels{nearest(name, known)}; allowed: {', '.join(known)}")
        group, channels = known[name], np.asarray(channels, np.int64)
        if not len(channels) or channels.min() < 0 or channels.max() >= group.size:
            raise UserError(f"of {name} channels 0 to {group.size - 1} can be kept, at least one; got {channels[:5]}")
        others = np.setdiff1d(np.arange(group.size), channels)
        for member in group.members:
            gone.setdefault((member.path, member.axis), set()).update(member.places(others).tolist())
    for (path, axis), places in gone.items():
        _cut(_variable(model, path), axis, places)
    if kept:
        _settle(model)


def keep_first(model: nnx.Module, sizes: Sequence[tuple[str, int]]) -> None:
    """Cut a model in place down to the first channels of some groups: the structure that other weights then fill."""
    keep(model, {name: np.arange(size) for name, size in sizes})


def _variable(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _cut(variable: Any, axis: int, gone: set[int]) -> None:
    array = variable.get_value()
    stay = np.array([i for i in range(array.shape[axis]) if i not in gone], np.int32)
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:axis], len(stay), *array.shape[axis + 1 :])
        variable.set_value(jax.ShapeDtypeStruct(shape, array.dtype))
    else:
        variable.set_value(jnp.take(array, stay, axis=axis))


def _settle(model: nnx.Module) -> None:
    """Let layers know the shapes that their arrays now have."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv) and module.kernel.shape[-2] == 1 and module.feature_group_count > 1:
            module.in_features = module.out_features = module.feature_group_count = module.kernel.shape[-1]
        elif isinstance(module, nnx.Linear):
            module.in_features, module.out_features = module.kernel.shape
        if hasattr(module, "channels_cut"):
            module.channels_cut()
