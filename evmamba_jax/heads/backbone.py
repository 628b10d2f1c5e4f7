"""Backbones as segmenters and detectors have them: four maps at strides of 4, 8, 16 and 32 pixels."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.heads.maps import PlainPyramid
from evmamba_jax.layers.backbone import BackboneConfig, StagedConfig
from evmamba_jax.models.registry import build_model, configuration

Families = Sequence[tuple[type[BackboneConfig], Mapping[str, Any]]]
# Options of a backbone that its place decides.
_DECIDED = ("num_classes", "out_norms", "class_token")


class Backbone(NamedTuple):
    """A backbone for heads.

    Attributes:
        body: ``body.features(images, key=key)`` gives four maps.
        channels: of each map.
        pyramid: makes maps of four sizes from a body that has one size; None where it has four.
    """

    body: Any
    channels: list[int]
    pyramid: Any


def build_backbone(
    name: str,
    *,
    official: Families,
    pyramid: Callable[..., Any] = PlainPyramid,
    options: Mapping[str, Any] | None,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> Backbone:
    """Build a backbone as the official segmenters and detectors have it.

    It has a norm for each of its four maps. Vim gives the residual streams after each quarter of its blocks, without a
    class token, which go through a pyramid of transposed convolutions.

    Args:
        name: one of :func:`evmamba_jax.list_models`.
        official: options of families, by their configurations, that hold unless ``options`` say otherwise.
        pyramid: makes that pyramid from channels and stride of the maps.
        options: of the backbone.
        dtype: compute type.
        rngs: source of the initial values.

    Raises:
        UserError: an unknown name or option, or an option that is decided here.
    """
    options = dict(options or {})
    for option in _DECIDED:
        if option in options:
            raise UserError(f"option {option!r} of a backbone under heads is decided by them: leave it out")
    config = configuration(name)
    given: dict[str, Any] = {"out_norms": True} if isinstance(config, StagedConfig) else {}
    if "class_token" in {field.name for field in dataclasses.fields(config)}:
        given["class_token"] = False
    for family, own in official:
        if isinstance(config, family):
            given |= own
    body = build_model(name, rngs=rngs, dtype=dtype, num_classes=0, **(given | options))
    if isinstance(body.config, StagedConfig):
        return Backbone(body, [body.config.width * 2**i for i in range(body.config.STAGES)], None)
    stride = getattr(body.config, "stride", body.config.patch_size)
    width = body.config.width
    return Backbone(body, [width] * 4, pyramid(width, stride, dtype=dtype, rngs=rngs))
