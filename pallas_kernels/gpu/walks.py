"""What a program of the GPU kernels walks: orders as tables of pixels, and which orders one program does in turn.

A program owns some channels of one image, so nobody else writes where it writes: it needs no atomics, and results are
the same in every run. Orders that share a pixel are one program's, one after another, and their sum never leaves it;
orders that share none run side by side. Where that makes too few programs to fill a GPU, each order gets a program, and
a result of its own that is added up afterwards.
"""

import dataclasses
import functools

import numpy as np

from pallas_kernels.orders import Chain, Order

# Tokens that are no pixel. In the padding of an image the state decays; a filler makes a walk long enough and does
# nothing at all.
PADDING, FILLER = -1, -2

# A token is ``pixel << BITS | flags``. Flags: the program's first and last visit of this pixel, and the last visit with
# this set of parameters. The backward pass runs in reverse, so its first visit is the forward pass's last.
FIRST, LAST, LAST_OF_SET, BITS = 1, 2, 4, 3

# Columns of ``WalkTable.rows``, a row for each walk.
LENGTH, SET, SLOT, LAYER, STARTS, ENDS = range(6)

# Walks are filled up to a multiple of it: the smallest side of a matrix that Triton multiplies.
MATRIX_SIDE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class WalkTable:
    """The walks of every program of an image, for each block of its channels.

    Attributes:
        tokens: (programs, walks, length) what each program reads; a multiple of 16 long.
        rows: (programs, walks, 6) about each walk, see LENGTH and so on: its tokens without fillers, its set of
            parameters, the slot of its projection, the layer of the result, whether the state starts and ends there.
        slots: projections that a pixel has room for.
        slot_of: the slot of each set.
        layers: results to be added up.
        complete: every pixel of every layer is written.
        exact: every set comes to all the pixels that are projected for it.
        merges: some program comes to a pixel more than once.
        remerges: so does some set.
        chained: some state runs on from a walk into the next.
        only_pixels: no walk passes through padding.
    """

    tokens: np.ndarray
    rows: np.ndarray
    slots: int
    slot_of: tuple[int, ...]
    layers: int
    complete: bool
    exact: bool
    merges: bool
    remerges: bool
    chained: bool
    only_pixels: bool

    @property
    def programs(self) -> int:
        """Programs for each image and block of channels."""
        return self.tokens.shape[0]


@functools.lru_cache
def walk_table(orders: tuple[Order | Chain, ...], height: int, width: int, *, apart: bool) -> WalkTable:
    """Lay out the walks over an image of (height, width); ``apart`` gives each order a program and maybe a layer."""
    walks = [[part.indices(height, width) for part in order.orders] for order in orders]
    visits = np.zeros((len(orders), height * width), int)
    for k, own in enumerate(walks):
        for walk in own:
            visits[k, walk[walk >= 0]] += 1
    seen = visits > 0
    room = np.stack([projected(order, height, width) for order in orders])
    slot_of = _colours(room)
    groups = [[k] for k in range(len(orders))] if apart else _connected(seen)
    layer_of = _colours(np.stack([seen[group].any(0) for group in groups]))
    layers = max(layer_of) + 1

    length = -(-max(len(walk) for own in walks for walk in own) // MATRIX_SIDE) * MATRIX_SIDE
    count = max(sum(len(walks[k]) for k in group) for group in groups)
    tokens = np.full((len(groups), count, length), FILLER, np.int32)
    rows = np.zeros((len(groups), count, 6), np.int32)
    for t, group in enumerate(groups):
        left, left_of_set = visits[group].sum(0), visits.copy()
        come = np.zeros(height * width, bool)
        row = 0
        for k in group:
            for i, walk in enumerate(walks[k]):
                inside = walk >= 0
                pixel = walk[inside]
                bits = FIRST * ~come[pixel] + LAST * (left[pixel] == 1) + LAST_OF_SET * (left_of_set[k, pixel] == 1)
                come[pixel] = True
                left[pixel] -= 1
                left_of_set[k, pixel] -= 1
                tokens[t, row, : len(walk)] = PADDING
                tokens[t, row, : len(walk)][inside] = (pixel << BITS) + bits
                rows[t, row] = len(walk), k, slot_of[k], layer_of[t], i == 0, i == len(walks[k]) - 1
                row += 1
        # Walks that a shorter group does not have: no tokens, and a new state.
        rows[t, row:] = 0, group[0], slot_of[group[0]], layer_of[t], 1, 1
    covered = np.zeros((layers, height * width), bool)
    for group, layer in zip(groups, layer_of, strict=True):
        covered[layer] |= seen[group].any(0)
    return WalkTable(
        tokens=tokens,
        rows=rows,
        slots=max(slot_of) + 1,
        slot_of=tuple(slot_of),
        layers=layers,
        complete=bool(covered.all()),
        exact=bool((seen == room).all()),
        merges=any(visits[group].sum(0).max() > 1 for group in groups),
        remerges=bool(visits.max() > 1),
        chained=any(len(own) > 1 for own in walks),
        only_pixels=all((walk >= 0).all() for own in walks for walk in own),
    )


@functools.lru_cache
def sequence_table(length: int, groups: int, *, reverse: bool) -> WalkTable:
    """Lay out the walks over groups of channels, each with its own parameters and projection, along a sequence."""
    one = walk_table((Order(reverse=reverse),), length, 1, apart=False)
    rows = np.repeat(one.rows, groups, 0)
    rows[..., [SET, SLOT]] = np.arange(groups)[:, None, None]
    return dataclasses.replace(one, tokens=np.repeat(one.tokens, groups, 0), rows=rows, slots=groups)


def sublattice(order: Order | Chain) -> Order:
    """Return the pixels that are projected for an order, row by row: its sub-lattice, or all where it has several."""
    lattices = {Order(origin=o.origin, step=o.step) for o in order.orders}
    return lattices.pop() if len(lattices) == 1 else Order()


def projected(order: Order | Chain, height: int, width: int) -> np.ndarray:
    """Return which pixels are projected for an order, (height * width)."""
    mask = np.zeros(height * width, bool)
    pixels = sublattice(order).indices(height, width)
    mask[pixels[pixels >= 0]] = True
    return mask


def _colours(masks: np.ndarray) -> list[int]:
    """Number sets of pixels such that no two of one number meet."""
    used: list[np.ndarray] = []
    numbers = []
    for mask in masks:
        number = next((n for n, other in enumerate(used) if not (other & mask).any()), len(used))
        if number == len(used):
            used.append(np.zeros_like(mask))
        used[number] = used[number] | mask
        numbers.append(number)
    return numbers


def _connected(masks: np.ndarray) -> list[list[int]]:
    """Group sets of pixels such that no two groups meet."""
    groups: list[tuple[list[int], np.ndarray]] = []
    for k, mask in enumerate(masks):
        meeting = [g for g in groups if (g[1] & mask).any()]
        groups = [g for g in groups if not (g[1] & mask).any()]
        members = [k, *(other for g in meeting for other in g[0])]
        groups.append((members, np.any([mask, *(g[1] for g in meeting)], 0)))
    return [sorted(members) for members, _ in groups]
