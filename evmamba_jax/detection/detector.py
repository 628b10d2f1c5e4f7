"""What all detectors have: a backbone with four maps, and detections of fixed shapes."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evmamba_jax.errors import UserError
from evmamba_jax.heads.backbone import Families
from evmamba_jax.heads.maps import PlainPyramid
from evmamba_jax.models.mambavision import MambaVisionConfig
from evmamba_jax.weights.convert import table
from evmamba_jax.weights.layers import Row, below
from evmamba_jax.weights.upernet import plain_pyramid

MULTIPLE = 32  # of the sides of images: of the coarsest map's stride


class Detections(NamedTuple):
    """What was found, in order of falling scores; beyond ``count`` boxes and scores are 0, and labels -1.

    Attributes:
        boxes: (B, D, 4), x0 y0 x1 y1 in pixels.
        scores: (B, D) from 0 to 1.
        labels: (B, D) int32 from 0.
        count: (B,) int32.
        masks: (B, D, S, S) from 0 to 1, how surely each part of the box is of the object; None of detectors of boxes.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    count: jax.Array
    masks: jax.Array | None = None


class Detector(nnx.Module):
    """The base of detectors. A call gives the raw outputs of images, ``outputs`` those of the backbone's maps.

    Args:
        backbone: a module whose ``features(images, key=key)`` gives maps of strides 4, 8, 16 and 32.
        pyramid: makes maps of these strides from a backbone that has one size.

    Attributes:
        body: options that families of backbones have under the official detectors.
        losses: names of the losses that ``loss`` returns; with "masks" a detector learns from masks, and finds some.
        settings: numbers of boxes; None of detectors that have no regions.
    """

    # The last two stages have one window for images of up to 1792 pixels a side.
    body: Families = ((MambaVisionConfig, {"window_size": (8, 8, 112, 56)}),)
    losses: ClassVar[tuple[str, ...]]
    settings: Any = None

    def __init__(self, backbone: Any, pyramid: Any):
        self.backbone = backbone
        self.pyramid = pyramid

    @classmethod
    def pyramid_of(cls, width: int) -> Callable[..., Any]:
        """Return what makes the pyramid of a backbone that has one size, from its channels and stride.

        Args:
            width: channels of the levels.
        """
        del width
        return PlainPyramid

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> Any:
        """Return the raw outputs.

        Args:
            images: (B, H, W, C) normalised floats, padded below and right to multiples of 32.
            key: draws the backbone's drop path in training mode.

        Raises:
            UserError: sides that are no multiples of 32; otherwise as the backbone.
        """
        sides = images.shape[1:3]
        if any(side % MULTIPLE for side in sides):
            size = "x".join(map(str, sides))
            raise UserError(f"images are {size}: pad both sides with zeros to multiples of {MULTIPLE}")
        maps = self.backbone.features(images, key=key)
        return self.outputs(maps if self.pyramid is None else self.pyramid(maps))

    @property
    def class_layers(self) -> tuple[str, ...]:
        """The paths of the layers that tell classes."""
        raise NotImplementedError

    def outputs(self, maps: Sequence[jax.Array]) -> Any:
        """Return the raw outputs of the backbone's maps [(B, h, w, C), ...]."""
        raise NotImplementedError


def sizes_of(images: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Return ``sizes``, where they are None the height and width (B, 2) of the whole of ``images``."""
    return jnp.broadcast_to(jnp.asarray(images.shape[1:3]), (len(images), 2)) if sizes is None else sizes


def with_backbone(model: Detector, rows: Sequence[Row]) -> list[Row]:
    """Return the official names of a detector: of its backbone, and the ``rows`` of all else."""
    pyramid = below("pyramid", "backbone", plain_pyramid())
    return [*below("backbone", "backbone", table(model.backbone)), *pyramid, *rows]
