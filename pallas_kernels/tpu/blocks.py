"""What a kernel is compiled for: the maths, the block of the image that it sees, and its schedule.

A block, for one walk of 6 pixels, 16 channels and 128 images::

                  lanes: 128 images
                +-------------------+
    sublanes:  /|                  /|    pixels lie on untiled axes: a pixel is a whole number of registers, and
    8 channels/ |      tile 0     / |    an order is an address
             +-------------------+  |
             |  |      tile 1    |  |    a tile is one register: 8 channels by 128 images
             |  +-------------------+    pixel (0, 0)
             | /                 | /
             |/                  |/  ... and so for pixels (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)
             +-------------------+
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.chip import LANES, SUBLANES, round_up
from pallas_kernels.tpu.geometry import Segment, Walk, for_tokens
from pallas_kernels.tpu.tuning import Turns

FLOAT32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Maths:
    """What is computed.

    Attributes:
        state: N.
        rank: R, rows of ``packed`` that hold the time step before its projection; 0 where time steps come from outside.
        softplus: whether time steps go through softplus.
        natural: whether time steps from outside are in natural units; all others come in units of ln 2.
        exact: float32 in all products and in softplus; otherwise products take bfloat16.
    """

    state: int
    rank: int
    softplus: bool
    natural: bool
    exact: bool

    @property
    def slab(self) -> int:
        """Rows of ``packed`` that the projection of the time step reads, whole registers of them."""
        return round_up(self.rank, SUBLANES)

    @property
    def set_rows(self) -> int:
        """Rows of ``packed`` for one parameter set: the time step's, N of B, N of C, and what fills the last tile."""
        return round_up(self.rank + 2 * self.state, SUBLANES)

    @property
    def product(self) -> dict[str, Any]:
        """Options of products with the projection's weights."""
        return {"precision": lax.Precision.HIGHEST if self.exact else None, "preferred_element_type": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How it is computed: nothing here changes a result.

    Attributes:
        turns: tokens of one turn of each loop.
        tiles: tiles of 8 channels in flight.
        pixels_a_product: pixels whose time steps are projected in one product.
        sum_each_token: sum dB and dC over the channels of a block token by token, not for all channels at the end.
        keep_decays: keep the decays of the recomputation for the way back.
    """

    turns: Turns
    tiles: int
    pixels_a_product: int
    sum_each_token: bool
    keep_decays: bool

    @property
    def channels_in_flight(self) -> int:
        """Channels that the recurrence handles together."""
        return self.tiles * SUBLANES


@dataclasses.dataclass(frozen=True)
class Block:
    """A sub-lattice of the image, or a chunk of it: what one step of the grid works on.

    Attributes:
        walks: what is done on the block.
        rows, columns: pixels of the block.
        flat: whether pixels lie on its first axis, row by row, or on the first two.
        channels: channels of the block, a multiple of 8.
        lanes: images, at most 128.
        chunks, blocks: sizes of the grid's axes over chunks and over channels.
        maths: what is computed.
        schedule: how.
    """

    walks: tuple[Walk, ...]
    rows: int
    columns: int
    flat: bool
    channels: int
    lanes: int
    chunks: int
    blocks: int
    maths: Maths
    schedule: Schedule

    @property
    def pixels(self) -> int:
        """Pixels of the block."""
        return self.rows * self.columns

    @property
    def axes(self) -> tuple[int, int]:
        """The two axes that pixels have in a block."""
        return (self.pixels, 1) if self.flat else (self.rows, self.columns)

    @property
    def tokens(self) -> int:
        """Tokens of its longest walk."""
        return max(len(walk.orders) for walk in self.walks) * self.pixels

    def segments(self, walk: Walk) -> list[tuple[Segment, int]]:
        """Return the segments of a walk, each with the number of tokens before it."""
        ways = [Segment.of(*order, self.rows, self.columns, flat=self.flat) for order in walk.orders]
        return [(segment, i * self.pixels) for i, segment in enumerate(ways)]

    def for_pixels(self, size: int, body) -> None:
        """Run ``body(pixels)`` over all pixels of the block, about ``size`` of them, a list, at once."""
        if self.flat or self.columns >= size:
            segment = Segment.of(False, False, self.rows, self.columns, flat=self.flat)

            def group(t, pixel, count, carry):
                body([pixel(i) for i in range(count)])
                return carry

            for_tokens(segment, size, group)
        else:  # several whole rows
            rows = Segment(1, self.rows, (0, 0), (0, 0), (1, 0))

            def lines(t, pixel, count, carry):
                body([(pixel(i)[0], column) for i in range(count) for column in range(self.columns)])
                return carry

            for_tokens(rows, size // self.columns, lines)

    def channel_groups(self) -> list[slice]:
        """Return the channels that are in flight together, for every such group."""
        size = self.schedule.channels_in_flight
        return [slice(i, i + size) for i in range(0, self.channels, size)]

    def row_of_B(self, walk: Walk) -> int:
        """Return the row of ``packed`` with the first B of a walk's parameters."""
        return walk.slot * self.maths.set_rows + self.maths.rank

    def row_of_C(self, walk: Walk) -> int:
        """Return the row of ``packed`` with the first C of a walk's parameters."""
        return self.row_of_B(walk) + self.maths.state


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a launch works on.

    Attributes:
        rows, columns: of a sub-lattice.
        step: (rows, columns) of the sub-lattices.
        channels: E, a multiple of 8.
        images: B; at most 128, or a multiple of it.
        slots: parameter sets of a sub-lattice.
        maths: what is computed.
        dtype: of x and dy.
        result: of y and dx.
        steps: of time steps that come from outside, and of their gradient.
    """

    rows: int
    columns: int
    step: tuple[int, int]
    channels: int
    images: int
    slots: int
    maths: Maths
    dtype: Any
    result: Any
    steps: Any = FLOAT32


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        block: what the kernel does on a block.
        shape: of the whole.
        origins: the sub-lattices.
        first: number of the first of the parameter sets; the block's walks count from it.
        sets: how many the call uses.
        reverse: the walk begins at the last chunk.
        single_buffered: arrays with one VMEM buffer instead of two. Inputs that all channels share lose their second
            buffer first: their next tile of images is then fetched late. Results lose it second: nothing is computed
            while they are written back.
    """

    block: Block
    shape: Shape
    origins: tuple[tuple[int, int], ...]
    first: int
    sets: int
    reverse: bool
    single_buffered: tuple[str, ...] = ()

    @property
    def cuts_lines(self) -> bool:
        """Whether chunks are parts of rows or of columns that do not follow one another in memory."""
        return not self.block.flat and self.block.rows < self.shape.rows and self.block.columns < self.shape.columns

    def place(self, chunk):
        """Return where the block of a chunk lies, counted in blocks; their numbers follow the walk, or its reverse."""
        if self.block.flat:
            return chunk, 0
        down, right = self.shape.rows // self.block.rows, self.shape.columns // self.block.columns
        if 1 in (down, right):  # whole lines, as nearly always: nothing for the scalar unit to divide
            return (0, chunk) if down == 1 else (chunk, 0)
        column_major, _ = self.block.walks[0].orders[0]
        return (chunk % down, chunk // down) if column_major else (chunk // right, chunk % right)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Tiles of images, sub-lattices, chunks, blocks of channels."""
        return -(-self.shape.images // LANES), len(self.origins), self.block.chunks, self.block.blocks

    def name(self, *, gradient: bool) -> str:
        """Return the name under which the call appears in profiles and in the compiler's dumps."""
        shape, walks = self.shape, "".join("c" if walk.orders[0][0] else "r" for walk in self.block.walks)
        kind = "backward" if gradient else "forward"
        sizes = f"{shape.rows}x{shape.columns}_{walks}{self.first}_e{shape.channels}_n{shape.maths.state}"
        return f"scan_{kind}_{sizes}"
