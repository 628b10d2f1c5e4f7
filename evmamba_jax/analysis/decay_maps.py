"""Decay maps: how much of what a token writes into the state is left at a later token of the same walk."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from evmamba_jax.analysis.scanning import Pixel, Recorded, ScanLayer, Terms, Track, find_layer, record, scan_layers
from evmamba_jax.errors import UserError
from pallas_kernels import Order

_BLOCK = 2**20  # decays at a time: 8 MiB
FAR = 10.0  # the factor from which on MSVMamba's figure counts a pixel as kept far better by one way


class DecayMap(NamedTuple):
    """The decay exp(sum dt A) from every pixel to one, along each of the W walks of a layer.

    Attributes:
        layer: whose scans they are; ``layer.walks`` names the walks.
        ends: (W,) the (row, column), or "class", to which each walk's map leads; "last" for the last token of the walk,
            in each window or line of the map.
        walks: (B, W, rows, columns) float64, the mean over channels and states: 1 at the end itself, and 0 where the
            walk does not come from, or only later.
    """

    layer: ScanLayer
    ends: tuple[Pixel | str, ...]
    walks: np.ndarray


def decay_map(
    model: Any, images: jax.Array, layer: str | int | ScanLayer, pixel: Pixel | str | None = None
) -> DecayMap:
    """Return how much is left at one pixel of what every other has written into the states of a layer's scans.

    A walk that does not visit the pixel leads to the nearest one that it does. Where a chain visits pixels again,
    another walk begins, which is taken by itself.

    Args:
        model: in evaluation mode; see :func:`evmamba_jax.analysis.scanning.scan_layers`.
        images: (B, H, W, C) normalised floats.
        layer: its name, its number in the list, or an entry of the list for images of this size.
        pixel: (row, column) of the layer's map; "class" for Vim's class token; "last" for the last token of each walk;
            None for the centre of the map.

    Raises:
        UserError: a model without scans, an unknown layer, a pixel that is not on the map.

    Source: Multi-Scale VMamba, figures 2 (to the centre) and 4 (to the last token).
    """
    if not isinstance(layer, ScanLayer):
        layer = find_layer(scan_layers(model, images.shape[1:3]), layer)
    pixel = (layer.inside[0] // 2, layer.inside[1] // 2) if pixel is None else pixel
    if pixel != "last":
        layer.place(pixel)
    (recorded,) = record(model, images, [layer])
    return decays(layer, recorded, pixel)


def decays(layer: ScanLayer, recorded: Sequence[Recorded], pixel: Pixel | str) -> DecayMap:
    """Return the map of what :func:`evmamba_jax.analysis.scanning.record` recorded of a layer.

    Arguments and errors as for :func:`decay_map`.
    """
    walks = range(len(layer.walks))
    ends = [_ends(layer, walk, pixel) for walk in walks]
    found = np.zeros((len(recorded[0].x), len(layer.walks), layer.places))
    for b in range(len(found)):
        for walk in walks:
            for track, end in ends[walk]:
                terms = Terms(layer, track, recorded[track.call].x[b])
                first = int(np.argmax(track.walks == walk))
                places = track.places[first : end + 1]
                own = places >= 0
                found[b, walk, places[own]] = _kept(terms, first, end)[own]
    rows, columns = layer.size
    named = ["last" if pixel == "last" else _pixel(layer, *ends[walk][0]) for walk in walks]
    return DecayMap(layer, tuple(named), found[..., : rows * columns].reshape(*found.shape[:2], rows, columns))


def decay_ratio(found: DecayMap) -> np.ndarray:
    """Return by which factor the better of rows and columns keeps a pixel over the other, at least 1.

    Of several walks by rows, there and back for instance, the one counts that keeps most; of those by columns too.

    Returns:
        (B, rows, columns), NaN where one way keeps nothing or does not come from.

    Raises:
        UserError: walks of one way only, or of both ways without a common pixel.

    Source: Multi-Scale VMamba, figure 2, which then marks the pixels with a ratio above 10.
    """
    orders = [walk.order for walk in found.layer.walks]
    by_rows = [i for i, order in enumerate(orders) if isinstance(order, Order) and not order.column_major]
    by_columns = [i for i, order in enumerate(orders) if isinstance(order, Order) and order.column_major]
    if not by_rows or not by_columns:
        raise UserError(f"{found.layer.name} does not walk by rows and by columns: it has no ratio of their decays")
    rows, columns = (found.walks[:, which].max(1) for which in (by_rows, by_columns))
    least, most = np.minimum(rows, columns), np.maximum(rows, columns)
    if not least.any():
        raise UserError(
            f"no pixel of {found.layer.name} is kept by rows and by columns: it has no ratio of their decays"
        )
    return np.divide(most, least, out=np.full_like(most, np.nan), where=least > 0)


def _ends(layer: ScanLayer, walk: int, pixel: Pixel | str) -> list[tuple[Track, int]]:
    """Return the sequences that hold a walk, and the token of each to which the map leads."""
    tracks = [track for track in layer.tracks if (track.walks == walk).any()]
    if pixel == "last":
        return [(track, int(np.flatnonzero(track.walks == walk)[-1])) for track in tracks]
    place = layer.place(pixel)
    best: tuple[float, Track, int] | None = None
    for track in tracks:
        tokens = np.flatnonzero((track.walks == walk) & (track.places >= 0))
        far = _squared_distances(layer, track.places[tokens], place)
        nearest = int(far.argmin())
        if best is None or far[nearest] < best[0]:
            best = far[nearest], track, int(tokens[nearest])
    assert best is not None, f"{layer.name} has no token of walk {walk}"
    return [best[1:]]


def _squared_distances(layer: ScanLayer, places: np.ndarray, place: int) -> np.ndarray:
    """Return those of places from one; the class token is near to itself alone."""
    token = layer.size[0] * layer.size[1]
    if place == token:
        return np.where(places == place, 0.0, np.inf)
    rows, columns = np.divmod(places, layer.size[1])
    row, column = divmod(place, layer.size[1])
    return np.where(places == token, np.inf, (rows - row) ** 2.0 + (columns - column) ** 2.0)


def _kept(terms: Terms, first: int, end: int) -> np.ndarray:
    """Return the mean over channels and states of the decay from each token from ``first`` on to ``end``."""
    width = len(terms.D)
    step = max(1, _BLOCK // (end + 1))
    total = np.zeros(end + 1 - first)
    for start in range(0, width, step):
        block = slice(start, start + step)
        passed = np.cumsum(terms.dt(block)[first : end + 1], 0)
        between = passed[-1] - passed
        for a in terms.A[block].T:
            total += np.exp(between * a).sum(-1)
    return total / terms.A.size


def _pixel(layer: ScanLayer, track: Track, end: int) -> Pixel:
    place = int(track.places[end])
    return "class" if place == layer.size[0] * layer.size[1] else divmod(place, layer.size[1])
