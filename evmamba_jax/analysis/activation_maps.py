"""Activation maps: with which weight every pixel enters the scan's result at a chosen one.

A selective scan is linear in what it scans once the steps, B and C are known. Unrolled, with D for the skip::

    y[t, e] = sum_{s <= t} w[t, s, e] x[s, e]  +  D[e] x[t, e]
    w[t, s, e] = sum_n C[t, n] exp(sum_{s < r <= t} dt[r, e] A[e, n]) dt[s, e] B[s, n]

So each pair of tokens has a weight for each channel e. This file computes them in float64, and with powers of negative
numbers alone, so that none overflows or is cut off.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from evmamba_jax.analysis.scanning import Pixel, Recorded, ScanLayer, Terms, Track, find_layer, record, scan_layers
from evmamba_jax.errors import UserError, one_of

Channels = Literal["absolute", "mean", "each"]

_GIB = 2**30
_BLOCK = 2**20  # weights at a time, of one pixel: 8 MiB


class ActivationMap(NamedTuple):
    """Weights with which the pixels of a map enter the result of a layer's scans at P chosen ones.

    Arrays are float64, and have one more axis, E, where each channel was asked for.

    Attributes:
        layer: whose scans they are; ``layer.walks`` names the W walks.
        pixels: the P chosen ones.
        walks: (B, P, W, rows, columns) what each walk brings from each pixel; 0 where it comes from none.
        merged: (B, P, rows, columns) of all walks together: the walks are added, then their sum, or its absolute value,
            is averaged over channels.
        class_walks: (B, P, W) what each walk brings from the class token; None where there is none.
        class_merged: (B, P) of all walks together.
    """

    layer: ScanLayer
    pixels: tuple[Pixel, ...]
    walks: np.ndarray
    merged: np.ndarray
    class_walks: np.ndarray | None
    class_merged: np.ndarray | None


def activation_map(
    model: Any,
    images: jax.Array,
    layer: str | int | ScanLayer,
    pixels: Sequence[Pixel] | None = None,
    *,
    weights: str = "exact",
    channels: Channels = "absolute",
    skip: bool = False,
    memory: float = 2.0,
) -> ActivationMap:
    """Return with which weights the pixels of a map enter the result of a layer's scans at chosen ones.

    Args:
        model: in evaluation mode; see :func:`evmamba_jax.analysis.scanning.scan_layers`.
        images: (B, H, W, C) normalised floats.
        layer: its name, its number in the list, or an entry of the list for images of this size.
        pixels: (row, column) of the layer's map, or "class" for Vim's class token; None takes all pixels.
        weights: "exact", with which the sum over all pixels of weight times x is the scan's own result; or as VMamba's
            figures have them: "CB", C[t] B[s] alone; "CwBw", with the decay between but without dt; "CwBdtw", with
            both. The last two divide by the decay since the first token, of at least 1e-20, and so are wrong far from
            it.
        channels: "absolute", the mean over channels of the absolute weights; "mean", of the weights with their signs,
            as VMamba's figures have it; "each", those of each channel.
        skip: add D to the weight of the chosen pixel itself; of no part in VMamba's figures.
        memory: what the map may take, in GiB, beside the model's own pass over the images.

    Raises:
        UserError: a model without scans, an unknown layer, weights or channels, a pixel that is not on the map, a map
            that takes more memory.

    Source: Ali, Zimerman, Wolf, The Hidden Attention of Mamba Models (arXiv:2403.01590); MzeroMiko/VMamba
    ``analyze/utils.py``, ``AttnMamba``.
    """
    if not isinstance(layer, ScanLayer):
        layer = find_layer(scan_layers(model, images.shape[1:3]), layer)
    if pixels is None:
        pixels = list(np.ndindex(*layer.inside))
    check_memory(layer, len(images), len(pixels), channels, memory)
    for pixel in pixels:  # before the model runs
        layer.place(pixel)
    (recorded,) = record(model, images, [layer])
    return unrolled(layer, recorded, pixels, weights=weights, channels=channels, skip=skip)


def check_memory(layer: ScanLayer, images: int, pixels: int, channels: Channels, memory: float) -> None:
    """Raise a UserError where the map of so many pixels in so many images takes more than ``memory``, in GiB."""
    tokens = sum(math.prod(call.shape) for call in layer.calls)
    fixed = 2 * 4 * images * tokens + 8 * 4 * _BLOCK  # what the scans read and return, and work in progress
    each = layer.channels if channels == "each" else 1
    one = 8 * images * (len(layer.walks) + 1) * layer.places * each
    if fixed + pixels * one <= memory * _GIB:
        return
    fit = int((memory * _GIB - fixed) // one)
    takes = f"{(fixed + pixels * one) / _GIB:.2g} GiB"
    of = f"{pixels} pixel{'s' * (pixels > 1)} in {images} image{'s' * (images > 1)}"
    of += ", each channel," * (channels == "each")
    less = f"take {fit} pixels or fewer at a time" if fit > 0 else "take fewer images, or smaller ones"
    less += ", or their mean over channels" if channels == "each" else ""
    raise UserError(f"the map of {layer.name} for {of} takes {takes}, and memory={memory:g} allows less: {less}")


def unrolled(
    layer: ScanLayer,
    recorded: Sequence[Recorded],
    pixels: Sequence[Pixel],
    *,
    weights: str = "exact",
    channels: Channels = "absolute",
    skip: bool = False,
) -> ActivationMap:
    """Return the map of what :func:`evmamba_jax.analysis.scanning.record` recorded of a layer.

    Arguments and errors as for :func:`activation_map`.
    """
    weigh = one_of("weights", weights, WEIGHTS)
    one_of("channels", channels, dict.fromkeys(("absolute", "mean", "each")))
    wanted = [layer.place(pixel) for pixel in pixels]
    batch, width = len(recorded[0].x), layer.channels
    each = (width,) if channels == "each" else ()
    walks = np.zeros((batch, len(pixels), len(layer.walks), layer.places, *each))
    merged = np.zeros((batch, len(pixels), layer.places, *each))
    tracks = [track for track in layer.tracks if np.isin(wanted, track.places).any()]
    visits = [_visits(track.places) for track in tracks]
    step = max(1, _BLOCK // (len(layer.walks) * layer.places))
    for b in range(batch):
        terms = [Terms(layer, track, recorded[track.call].x[b]) for track in tracks]
        for first in range(0, width, step):
            block = slice(first, first + step)
            along = [_Along.of(one, block) for one in terms]
            for p, place in enumerate(wanted):
                found = np.zeros((len(layer.walks), layer.places, len(along[0].D)))
                for track, visit, one in zip(tracks, visits, along, strict=True):
                    _add(found, track, visit, one, place, weigh, skip)
                together = found.sum(0)
                if channels == "each":
                    walks[b, p, ..., block], merged[b, p, ..., block] = found, together
                else:
                    of = np.abs if channels == "absolute" else np.asarray
                    walks[b, p] += of(found).sum(-1) / width
                    merged[b, p] += of(together).sum(-1) / width
    own = math.prod(layer.size)
    shape = (*layer.size, *each)
    return ActivationMap(
        layer=layer,
        pixels=tuple(pixels),
        walks=walks[:, :, :, :own].reshape(*walks.shape[:3], *shape),
        merged=merged[:, :, :own].reshape(*merged.shape[:2], *shape),
        class_walks=walks[:, :, :, own] if layer.class_token else None,
        class_merged=merged[:, :, own] if layer.class_token else None,
    )


def rollout(maps: Sequence[ActivationMap]) -> np.ndarray:
    """Return how the pixels enter the last of several layers through all of them: the product of their maps.

    Each map is scaled to [0, 1] over an image, the identity is added, and every row is divided by its sum.

    Args:
        maps: of all pixels, each layer's by itself, in the order of the model; of one size and without class token.

    Returns:
        (B, P, rows, columns) for the P = rows * columns pixels.

    Raises:
        UserError: no maps, maps of some pixels only, or maps that differ in size.

    Source: Abnar and Zuidema (arXiv:2005.00928); ``AttnMamba.get_attnmap_mamba``, which divides by the sums of the rows
    along the columns.
    """
    sizes = {one.merged.shape for one in maps}
    if len(sizes) != 1 or len(shape := sizes.pop()) != 4 or shape[1] != shape[2] * shape[3]:
        raise UserError("a rollout takes maps of all pixels (pixels=None), of one size, and without channels='each'")
    flat = (*shape[:2], shape[1])
    product = np.broadcast_to(np.eye(shape[1]), flat)
    for one in maps:
        weights = one.merged.reshape(flat)
        least, most = (weights.min((1, 2), keepdims=True), weights.max((1, 2), keepdims=True))
        mixed = (weights - least) / (most - least) + np.eye(shape[1])
        product = mixed / mixed.sum(-1, keepdims=True) @ product
    return product.reshape(shape)


class _Along(NamedTuple):
    """The terms along one sequence for a block of P channels."""

    dt: np.ndarray  # (L, P)
    passed: np.ndarray  # (L, P) sum of the time steps up to each token
    A: np.ndarray  # (P, N)
    B: np.ndarray  # (L, N)
    C: np.ndarray  # (L, N)
    D: np.ndarray  # (P,)

    @classmethod
    def of(cls, terms: Terms, channels: slice) -> "_Along":
        dt = terms.dt(channels)
        return cls(dt, np.cumsum(dt, 0), terms.A[channels], terms.B, terms.C, terms.D[channels])


def _visits(places: np.ndarray) -> np.ndarray:
    """Return how many tokens before each (L,) stand at its place."""
    order = np.argsort(places, kind="stable")
    at = places[order]
    visits = np.empty_like(places)
    visits[order] = np.arange(len(places)) - np.searchsorted(at, at)
    return visits


def _add(
    found: np.ndarray, track: Track, visits: np.ndarray, along: _Along, place: int, weigh: Any, skip: bool
) -> None:
    """Add to ``found`` (W, places, P) the weights with which the tokens of a sequence enter those at a place."""
    for t in np.flatnonzero(track.places == place):
        to = found[track.walks[t]]
        weights = weigh(along, t)
        places, visit = track.places[: t + 1], visits[: t + 1]
        for number in range(visit[places >= 0].max() + 1):  # an addition by index counts a place once
            own = (visit == number) & (places >= 0)
            to[places[own]] += weights[own]
        if skip:
            to[place] += along.D


def _exact(along: _Along, t: int) -> np.ndarray:
    """Return the weights (t + 1, P) of the tokens up to t."""
    between = along.passed[t] - along.passed[: t + 1]  # not negative, as time steps are positive
    total = np.zeros_like(between)
    for a, b, c in zip(along.A.T, along.B[: t + 1].T, along.C[t], strict=True):
        total += np.exp(between * a) * (c * b)[:, None]
    return total * along.dt[: t + 1]


def _products(along: _Along, t: int) -> np.ndarray:
    return np.broadcast_to((along.B[: t + 1] @ along.C[t])[:, None], (t + 1, along.dt.shape[1]))


def _quotients(along: _Along, t: int) -> np.ndarray:
    total = np.zeros((t + 1, along.dt.shape[1]))
    for a, b, c in zip(along.A.T, along.B[: t + 1].T, along.C[t], strict=True):
        decay = np.exp(along.passed[: t + 1] * a)
        total += c * decay[t] * b[:, None] / np.maximum(decay, 1e-20)
    return total


WEIGHTS: dict[str, Callable[[_Along, int], np.ndarray]] = {
    "exact": _exact,
    "CB": _products,
    "CwBw": _quotients,
    "CwBdtw": lambda along, t: _quotients(along, t) * along.dt[: t + 1],
}
