"""The selective scans of a model: which there are, the walks of each over its map, and what each reads of an image."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.analysis.orders import describe
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.layers.backbone import PlainBackbone, Stage
from evmamba_jax.layers.s6 import S6
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.course_vim import CourseMixer
from evmamba_jax.models.mambavision import MambaVisionMixer, WindowStage
from evmamba_jax.models.msvmamba import MS2D
from evmamba_jax.models.vim import Direction
from pallas_kernels import Chain, Order

Pixel = tuple[int, int] | Literal["class"]  # (row, column) of a map, or Vim's class token

_BATCH = 8  # images that the model sees at a time

_Path = tuple[Any, ...]  # names of attributes, and numbers in lists

# The four scans of a cascade, in the order of its calls.
_CASCADE = (
    ("rows_back", Order(reverse=True)),
    ("rows", Order()),
    ("columns_back", Order(column_major=True, reverse=True)),
    ("columns", Order(column_major=True)),
)


class Walk(NamedTuple):
    """One walk of a layer over its map.

    Attributes:
        title: in words, e.g. "columns, backwards".
        order: as a walk over the map, or over a window or a line of it.
    """

    title: str
    order: Order | Chain


class Call(NamedTuple):
    """A call of a scan in the forward pass of one image.

    Attributes:
        path: of the S6 in the model.
        number: among the calls of this S6.
        shape: (G, H, W, E) of what it gets: G maps of H rows, W columns and E channels.
        orders: along which it runs.
        sets: which parameters each order has.
    """

    path: _Path
    number: int
    shape: tuple[int, ...]
    orders: tuple[Order | Chain, ...]
    sets: tuple[int, ...]


class Track(NamedTuple):
    """A sequence that a layer scans of an image.

    Attributes:
        call: number of the call in the layer.
        group: which of the G maps of the call it is read from.
        set: which parameters it is scanned with.
        tokens: (L,) pixel ``row * W + column`` of that map, -1 where a token is padding.
        places: (L,) pixel ``row * columns + column`` of the layer's map, -1 where a token is padding; the class token's
            is ``rows * columns``.
        walks: (L,) number of the walk that each token belongs to; a chain has several.
    """

    call: int
    group: int
    set: int
    tokens: np.ndarray
    places: np.ndarray
    walks: np.ndarray


class ScanLayer(NamedTuple):
    """The scans of a model that one map shows: those whose results are added up.

    Attributes:
        name: e.g. "stages.1.blocks.0.mixer.scan"; a part after a colon tells several scans by the same parameters
            apart.
        size: (rows, columns) of its map, with what windows add below and right.
        inside: (rows, columns) without that.
        class_token: whether a class token is among the tokens.
        walks: over the map.
        calls: of scans.
        tracks: the sequences.
        scans: one an entry of ``calls``, the module with the parameters.
    """

    name: str
    size: tuple[int, int]
    inside: tuple[int, int]
    class_token: bool
    walks: tuple[Walk, ...]
    calls: tuple[Call, ...]
    tracks: tuple[Track, ...]
    scans: tuple[S6, ...]

    @property
    def places(self) -> int:
        """Pixels of the map, and the class token if there is one."""
        return self.size[0] * self.size[1] + self.class_token

    @property
    def channels(self) -> int:
        """E of the scans."""
        return self.calls[0].shape[-1]

    @property
    def states(self) -> int:
        """N of every channel."""
        return self.scans[0].A_log.shape[-1]

    def place(self, pixel: tuple[int, int] | str) -> int:
        """Return where a (row, column), or "class", stands among ``places``.

        Raises:
            UserError: a pixel outside of the image; "class" where there is no class token.
        """
        if isinstance(pixel, str):
            if pixel != "class" or not self.class_token:
                told = "no class token" if pixel == "class" else f"no pixel {pixel!r}"
                raise UserError(f"{self.name} has {told}: give a row and a column")
            return self.size[0] * self.size[1]
        row, column = pixel
        rows, columns = self.inside
        if not (0 <= row < rows and 0 <= column < columns):
            raise UserError(
                f"pixel ({row}, {column}) is outside of the map of {self.name}, {rows}x{columns}: rows 0 to {rows - 1} "
                f"and columns 0 to {columns - 1} are allowed"
            )
        return row * self.size[1] + column


class Recorded(NamedTuple):
    """What a call of a scan got and returned.

    Attributes:
        x: (B, G, H, W, E), in the dtype of the model.
        y: the same shape, the sum over its orders.
    """

    x: np.ndarray
    y: np.ndarray


class _Notes:
    """What the scans of a forward pass note: their calls, in time, and the arrays of each."""

    def __init__(self):
        self.calls: list[Call] = []
        self.arrays: list[tuple[jax.Array, jax.Array]] = []


class _Recording(S6):
    """A scan that notes what it gets and returns.

    It holds its own path, so that its block equals no other and is run outside of the loop over equal blocks.
    """

    def __init__(self, scan: S6, path: _Path, notes: _Notes):
        for name, value in vars(scan).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.path = path
        self.notes = notes

    def __call__(
        self, x: jax.Array, orders: Sequence[Order | Chain], *, sets: Sequence[int] | None = None
    ) -> jax.Array:
        """Scan as S6 does."""
        y = super().__call__(x, orders, sets=sets)
        number = sum(call.path == self.path for call in self.notes.calls)
        own = tuple(range(len(orders)) if sets is None else sets)
        self.notes.calls.append(Call(self.path, number, x.shape, tuple(orders), own))
        self.notes.arrays.append((x, y))
        return y


def scan_layers(model: Any, image_size: int | Sequence[int]) -> list[ScanLayer]:
    """Return the layers of a model that scan, in the order in which an image passes them. Computes nothing.

    A layer is what adds up to one map. The two directions of Vim's mixer are one; the scans of MSVMamba at full and at
    half resolution are two, and the four scans of a cascade are four, as norms stand between.

    Args:
        model: with ``features(images)``, as all models of this library have it; a model of one's own may have mixers of
            its own, whose scans are taken for scans of a map.
        image_size: side, or (height, width), of the images in pixels.

    Raises:
        UserError: a model without selective scans; images too small for it.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    notes = _Notes()

    def features(state, images):
        return _watched(nnx.merge(graphdef, state), None, notes).features(images)

    graphdef, state = nnx.split(model)
    maps = jax.eval_shape(features, state, jax.ShapeDtypeStruct((1, height, width, model.in_channels), jnp.float32))
    if not notes.calls:
        raise UserError(
            f"{type(model).__name__} has no selective scan here: its activation and decay cannot be mapped (an S4D, an "
            "S5 and attention have other weights)"
        )
    modules = dict(nnx.iter_modules(model))
    layers = []
    for path, calls in itertools.groupby(notes.calls, key=lambda call: _mixer_path(modules, call.path)):
        layers += _layers_of(modules, path, list(calls), [features.shape[1:3] for features in maps])
    return layers


def find_layer(layers: Sequence[ScanLayer], given: str | int) -> ScanLayer:
    """Return the layer of a name or of a number in the list; raises a UserError for another."""
    names = [layer.name for layer in layers]
    how = f"'scans' lists them: 0 to {len(names) - 1}, {names[0]} to {names[-1]}"
    if isinstance(given, int) or re.fullmatch("-?[0-9]+", given):
        number = int(given)
        if not -len(layers) <= number < len(layers):
            raise UserError(f"there is no layer {number}; {how}")
        return layers[number]
    if given not in names:
        below = [name for name in names if name.startswith(given)]
        near = f", did you mean {' or '.join(map(repr, below[:4]))}?" if below else nearest(given, names)
        raise UserError(f"unknown layer {given!r}{near}; {how}")
    return layers[names.index(given)]


def record(model: Any, images: jax.Array, layers: Sequence[ScanLayer]) -> list[list[Recorded]]:
    """Return what the scans of some layers get and return in one forward pass, which ends with the last of them.

    Args:
        model: as for :func:`scan_layers`.
        images: (B, H, W, C) normalised floats, of the size that the layers were listed for.
        layers: of this model.

    Returns:
        For each layer, one entry for each of its calls.

    Raises:
        UserError: layers that were listed for another model, or images of another size.
    """
    wanted = [call for layer in layers for call in layer.calls]
    paths = {call.path for call in wanted}

    @jax.jit
    def arrays(state, images):
        notes = _Notes()
        _watched(nnx.merge(graphdef, state), paths, notes).features(images)
        found = {}
        for call, pair in zip(notes.calls, notes.arrays, strict=True):
            groups, *shape = call.shape
            found[call._replace(shape=(groups // len(images), *shape))] = pair
        if not found.keys() >= set(wanted):
            height, width = images.shape[1:3]
            raise UserError(
                f"the layers do not fit the model or images of {height}x{width}: list them by scan_layers(model, "
                f"({height}, {width}))"
            )
        return [found[call] for call in wanted]

    graphdef, state = nnx.split(model)
    parts = [arrays(state, images[first : first + _BATCH]) for first in range(0, len(images), _BATCH)]
    whole = iter(jax.tree.map(lambda *of_parts: np.concatenate(of_parts), *parts))
    by_image = (len(images), -1)
    return [
        [Recorded(*(array.reshape(*by_image, *array.shape[1:]) for array in next(whole))) for _ in layer.calls]
        for layer in layers
    ]


class Terms:
    """The terms of the recurrence along one sequence, float64; those of its channels on demand.

    Args:
        layer: whose sequence it is.
        track: the sequence.
        x: (G, H, W, E) that the track's call gets for one image.

    Attributes:
        B: (L, N) what a token writes into the state with.
        C: (L, N) what it reads it with.
        A: (E, N) decay rates, negative.
        D: (E,) weights of the skip.
    """

    def __init__(self, layer: ScanLayer, track: Track, x: np.ndarray):
        scan = layer.scans[track.call]

        def own(parameter: Any) -> np.ndarray:
            return np.asarray(parameter[...][track.set], np.float64)

        pixels = x[track.group].reshape(-1, x.shape[-1])
        tokens = np.where(track.tokens[:, None] < 0, 0, pixels[track.tokens]).astype(np.float64)
        self._dt_proj, self._dt_bias = own(scan.dt_proj), scan.dt_bias_factor * own(scan.dt_bias)
        self.A, self.D = -np.exp(own(scan.A_log)), own(scan.D)
        rank, state = len(self._dt_proj), self.A.shape[1]
        self._steps, self.B, self.C = np.split(tokens @ own(scan.x_proj), [rank, rank + state], -1)

    def dt(self, channels: slice) -> np.ndarray:
        """Return the time steps (L, channels)."""
        raw = self._steps @ self._dt_proj[:, channels] + self._dt_bias[channels]
        return np.where(raw > 20, raw, np.logaddexp(0, raw))  # the softplus of the kernels


def _watched(model: Any, paths: set[_Path] | None, notes: _Notes) -> Any:
    """Return the model, in evaluation mode, with scans that note what they get: those at ``paths``, or all."""
    model.eval()
    modules: list[tuple[_Path, Any]] = list(nnx.iter_modules(model))
    for path, module in modules:
        if isinstance(module, S6) and (paths is None or path in paths):
            *above, name = path
            parent = model
            for step in above:
                parent = parent[step] if isinstance(step, int) else getattr(parent, step)
            setattr(parent, name, _Recording(module, path, notes))
        # What a checkpointed block notes could not leave it.
        elif isinstance(module, Stage):
            module.remat = "none"
        elif isinstance(module, PlainBackbone):
            module.config = dataclasses.replace(module.config, remat="none")
    return model


def _mixer_path(modules: Mapping[_Path, Any], path: _Path) -> _Path:
    """Return the path of the mixer that a scan is part of."""
    return path[:-2] if isinstance(modules[path[:-1]], Direction) else path[:-1]


def _layers_of(
    modules: Mapping[_Path, Any], path: _Path, calls: list[Call], maps: list[tuple[int, int]]
) -> Iterator[ScanLayer]:
    """Yield the layers of the mixer at a path; ``maps`` are the sizes of the model's maps."""
    mixer = modules[path]
    name = ".".join(map(str, calls[0].path))
    stage = maps[path[1]] if path[0] == "stages" else maps[-1]
    windows = [above for i in range(len(path)) if isinstance(above := modules.get(path[:i]), WindowStage)]

    def layer(name: str, calls: Sequence[Call], size: tuple[int, int], **more: Any) -> ScanLayer:
        scans = tuple(modules[call.path] for call in calls)
        fields: dict[str, Any] = {"inside": size, "class_token": False, **more}
        return ScanLayer(name=name, size=size, calls=tuple(calls), scans=scans, **fields)

    def of_map(name: str, call: Call) -> ScanLayer:
        groups, height, width, _ = call.shape
        places = np.arange(groups * height * width).reshape(groups, -1)
        return layer(name, [call], (groups * height, width), **_walks_and_tracks(_reads([(call, places)])))

    if isinstance(mixer, MS2D):
        full, low = calls
        yield of_map(f"{name}:full", full)
        if mixer.version == 2:
            yield of_map(f"{name}:low", low)
        else:
            size = -(-stage[0] // 2), -(-stage[1] // 2)
            yield layer(f"{name}:low", [low], size, **_walks_and_tracks(_already_read(low, mixer.low, size)))
    elif isinstance(mixer, SS2D) and isinstance(mixer.orders, str):
        for call, (line, order) in zip(calls, _CASCADE, strict=True):
            size = (call.shape[2], call.shape[0]) if order.column_major else (call.shape[0], call.shape[2])
            places = order.indices(*size).reshape(call.shape[0], -1)
            # Backwards, the last line comes first.
            places = places[::-1] if order.reverse else places
            parts = _walks_and_tracks(_reads([(call, places)]))
            yield layer(f"{name}:{line}", [call], size, **parts | {"walks": (Walk(describe(order), order),)})
    elif isinstance(mixer, MambaVisionMixer) and windows:
        side = windows[-1].window
        rows, columns = -(-stage[0] // side), -(-stage[1] // side)
        size = rows * side, columns * side
        pixels = np.arange(size[0] * size[1]).reshape(rows, side, columns, side)
        places = pixels.swapaxes(1, 2).reshape(rows * columns, side * side)
        yield layer(name, calls, size, inside=stage, **_walks_and_tracks(_reads([(call, places) for call in calls])))
    elif isinstance(mixer, CourseMixer) or isinstance(modules[calls[0].path[:-1]], Direction):
        patches, tokens = stage[0] * stage[1], calls[0].shape[2]
        places = np.arange(patches)
        if tokens > patches:
            places = np.insert(places, patches // 2, patches)
        parts = _walks_and_tracks(_reads([(call, places[None]) for call in calls]))
        yield layer(".".join(map(str, path)), calls, stage, class_token=tokens > patches, **parts)
    else:
        for call in calls:
            yield of_map(name if len(calls) == 1 else f"{name}:{call.number}", call)


class _Read(NamedTuple):
    """How a call reads one order: once in each of its maps."""

    call: int
    set: int
    order: Order | Chain
    size: tuple[int, int]  # of the grid that the order walks over
    sequences: list[tuple[int, np.ndarray, np.ndarray]]  # group, tokens and places as in Track


def _reads(calls: Sequence[tuple[Call, np.ndarray]]) -> Iterator[_Read]:
    """Yield how calls read their maps, whose pixels have the places (G, H * W)."""
    for number, (call, places) in enumerate(calls):
        height, width = call.shape[1:3]
        for order, own in zip(call.orders, call.sets, strict=True):
            tokens = order.indices(height, width)
            at = [np.where(tokens < 0, -1, of_group[tokens]) for of_group in places]
            sequences = [(group, tokens, of_group) for group, of_group in enumerate(at)]
            yield _Read(number, own, order, (height, width), sequences)


def _already_read(call: Call, orders: Sequence[Order | Chain], size: tuple[int, int]) -> Iterator[_Read]:
    """Yield the orders of a call that gets the sequence of each as a map of height 1."""
    for group, order in enumerate(orders):
        places = order.indices(*size)
        yield _Read(0, call.sets[0], order, size, [(group, np.arange(len(places)), places)])


def _walks_and_tracks(reads: Iterable[_Read]) -> dict[str, Any]:
    walks: list[Walk] = []
    tracks: list[Track] = []
    for read in reads:
        own, lengths = _walks(read.order, *read.size)
        which = np.repeat(len(walks) + np.arange(len(own)), lengths)
        walks += own
        tracks += [Track(read.call, group, read.set, tokens, at, which) for group, tokens, at in read.sequences]
    return {"walks": _told_apart(walks), "tracks": tuple(tracks)}


def _walks(order: Order | Chain, height: int, width: int) -> tuple[list[Walk], list[int]]:
    """Return the walks of an order over a grid, and their tokens.

    A chain is one walk as long as it visits no pixel twice, as a snake does; where it would, another begins.
    """
    parts = order.orders
    if len(parts) == 1:
        return [Walk(describe(parts[0]), parts[0])], [order.length(height, width)]
    borders, seen = [0], set()
    for i, part in enumerate(parts):
        own = set(part.indices(height, width).tolist()) - {-1}
        if seen & own:
            borders.append(i)
            seen = set()
        seen |= own
    walks, lengths = [], []
    for first, end in itertools.pairwise([*borders, len(parts)]):
        lengths.append(sum(part.length(height, width) for part in parts[first:end]))
        if end - first == 1:
            walks.append(Walk(f"chain, {end} of {len(parts)}: {describe(parts[first])}", parts[first]))
        else:
            which = "" if end - first == len(parts) else f", {first + 1} to {end}"
            walks.append(Walk(f"chain of {len(parts)}{which}", Chain(parts[first:end])))
    return walks, lengths


def _told_apart(walks: Sequence[Walk]) -> tuple[Walk, ...]:
    """Return the walks with a number in the title of each that is walked several times."""
    alike = collections.Counter(walk.title for walk in walks)
    seen: collections.Counter[str] = collections.Counter()
    named = []
    for walk in walks:
        seen[walk.title] += 1
        count = alike[walk.title]
        title = walk.title if count == 1 else f"{walk.title}, {seen[walk.title]} of {count}"
        named.append(walk._replace(title=title))
    return tuple(named)
