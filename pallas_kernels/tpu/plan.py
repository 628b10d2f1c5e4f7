"""From a launch to calls: how large the blocks are, and which schedule fits the chip's memory. Plain Python."""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.tpu import arrays
from pallas_kernels.tpu.blocks import Block, Call, Schedule, Shape
from pallas_kernels.tpu.chip import LANES, SUBLANES, Chip
from pallas_kernels.tpu.geometry import Launch, Walk
from pallas_kernels.tpu.tuning import FEW_STATES

Cut = tuple[int, int, int]  # chunks, and the rows and columns of each


def plan(launch: Launch, shape: Shape, chip: Chip, *, gradient: bool) -> tuple[Call, ...] | None:
    """Divide a launch into calls whose blocks fit the chip; None if that cannot be done.

    Where there are several, each does some of the walks, and their results must be added up.
    """
    for count in reversed(_divisors(len(launch.walks))):  # of calls
        size = len(launch.walks) // count
        parts = [
            _fitting(launch, first, size, shape, chip, gradient=gradient) for first in range(0, count * size, size)
        ]
        if all(parts):
            return tuple(part for part in parts if part)
    return None


def _fitting(launch: Launch, first: int, size: int, shape: Shape, chip: Chip, *, gradient: bool) -> Call | None:
    """Return the best call that does ``size`` walks from the ``first`` on and fits; None if there is none."""
    walks = tuple(dataclasses.replace(walk, slot=walk.slot - first) for walk in launch.walks[first : first + size])
    _, reverse = walks[0].orders[0]
    blocks = list(_blocks(walks, shape, chip, gradient=gradient))
    calls = [
        Call(block, shape, launch.origins, first, len(walks), reverse, single)
        for single in ((), arrays.SHARED, (*arrays.SHARED, *arrays.RESULTS))
        for block in blocks
    ]
    for call in sorted(calls, key=lambda call: call.cuts_lines):  # more chunks cost more than waiting for memory
        if arrays.memory(call, gradient=gradient) <= chip.room:
            return call
    return None


def _blocks(walks: tuple[Walk, ...], shape: Shape, chip: Chip, *, gradient: bool) -> Iterator[Block]:
    """Yield the blocks that could do these walks, the most promising first."""
    state, tuning = shape.maths.state, chip.tuning
    sizes = [c for c in _divisors(shape.channels) if c % SUBLANES == 0]
    wanted = tuning.channels_few if state <= 4 else tuning.channels
    sizes = [c for c in sizes if c <= wanted] or sizes[-1:]
    alone = len(walks) == 1 and len(walks[0].orders) == 1
    column_major = alone and walks[0].orders[0][0] and min(shape.rows, shape.columns) > 1
    cuts = list(_cuts(shape, column_major=column_major)) if alone else [(1, shape.rows, shape.columns)]

    def block(cut: Cut, channels: int, *, sum_each_token: bool, keep_decays: bool) -> Block:
        chunks, rows, columns = cut
        return Block(
            walks=walks,
            rows=rows,
            columns=columns,
            flat=shape.step == (1, 1) and not (column_major and chunks > 1),
            channels=channels,
            lanes=min(shape.images, LANES),
            chunks=chunks,
            blocks=shape.channels // channels,
            maths=shape.maths,
            schedule=_schedule(
                shape, channels, chip, gradient=gradient, sum_each_token=sum_each_token, keep_decays=keep_decays
            ),
        )

    # With few states, dB and dC are summed over channels token by token: one sum serves many channels. The decays of
    # the recomputation are kept if that needs no chunks and no smaller block of channels.
    if gradient and state <= FEW_STATES:
        for channels in sizes:
            for keep in (True, False):
                yield block(cuts[0], channels, sum_each_token=True, keep_decays=keep)
    # Otherwise they are summed once at the end, which only a single walk can do.
    if not gradient or len(walks) == 1:
        for cut in cuts:
            for channels in sizes:
                yield block(cut, channels, sum_each_token=False, keep_decays=tuning.keep_decays)


def _schedule(
    shape: Shape, channels: int, chip: Chip, *, gradient: bool, sum_each_token: bool, keep_decays: bool
) -> Schedule:
    """Return the schedule of a kernel for blocks of so many channels."""
    maths, tuning, tiles = shape.maths, chip.tuning, channels // SUBLANES
    # The sums of dB and dC over the channels of a block take all of its tiles at once.
    limit = max(tuning.states_in_flight, maths.state)
    flying = tiles if sum_each_token else max(n for n in _divisors(tiles) if n * maths.state <= limit)
    # A product's weights have a side of at most the matrix unit's; both of their sides are streamed on the way back.
    sides = (
        (LANES // max(maths.slab, SUBLANES), LANES // channels)
        if gradient
        else (tuning.product_side // max(maths.slab, SUBLANES),)
    )
    return Schedule(
        turns=tuning.turns(state=maths.state, channels=channels, tiles=flying, gradient=gradient),
        tiles=flying,
        pixels_a_product=max(1, min(*sides, tuning.pixels_a_product)),
        sum_each_token=sum_each_token,
        keep_decays=keep_decays,
    )


def _cuts(shape: Shape, *, column_major: bool) -> Iterator[Cut]:
    """Yield how the sub-lattice of one walk can be cut: so many chunks of (rows, columns), the fewest first."""
    yield 1, shape.rows, shape.columns
    if shape.step == (1, 1) and not column_major:  # tokens that follow one another do so in memory
        tokens = shape.rows * shape.columns
        yield from ((tokens // n, 1, n) for n in _divisors(tokens)[1:])
        return
    lines, length = (shape.columns, shape.rows) if column_major else (shape.rows, shape.columns)
    whole = [(n, length) for n in _divisors(lines)[1:]]
    for across, along in (*whole, *((1, n) for n in _divisors(length)[1:])):
        rows, columns = (along, across) if column_major else (across, along)
        yield lines // across * (length // along), rows, columns


def _divisors(n: int) -> list[int]:
    """Return all divisors, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]
