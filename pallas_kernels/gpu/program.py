"""What a program of the GPU kernels is compiled for: its channels, the maths, its walks, and its schedule.

A program is one warp. It has ``width`` channels of one image and goes along its walks alone::

    thread        0    1    2   ...  31
    channel       0    1    2   ...  31        a token's x, dy, y, dt: one value a thread
    state 0      h00  h01  h02  ...            the state (N, P) in registers: a column a thread
    state 1      h10  h11  h12  ...
    B, C, low     a value for each state or rank, the same for all threads

With a single state and nothing to project, a thread going forward has two neighbouring channels.
"""

import dataclasses

from pallas_kernels.gpu import walks
from pallas_kernels.gpu.walks import WalkTable

WIDTH = 32  # channels of a program, one for each thread of its warp; some have two for each


def power_of_two(count: int) -> int:
    """Return the least power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program does.

    Attributes:
        width: channels of a program, a power of two.
        channels: of the image (or group); the last program may have less than ``width``.
        blocks: programs that share the channels.
        state: N, a power of two.
        rank: R of the step size; 0 where it comes as an array of its own, ``delta``.
        softplus: whether the step size goes through it.
        walks: of a program.
        tokens_a_turn: tokens whose loads are under way at once, and whose states the backward pass holds; divides 16.
        chunk: tokens between two states that the backward pass keeps to the end; a multiple of 16.
        chunks: of the longest walk.
        merges, remerges, chained: as in ``walks.WalkTable``.
        all_pixels: all tokens are pixels, with neither padding nor fillers.
        registers: that a thread may take, or None.
        gradient: whether it is the backward program.
        interpret: whether the program is interpreted.
    """

    width: int
    channels: int
    blocks: int
    state: int
    rank: int
    softplus: bool
    walks: int
    tokens_a_turn: int
    chunk: int
    chunks: int
    merges: bool
    remerges: bool
    chained: bool
    all_pixels: bool
    registers: int | None
    gradient: bool
    interpret: bool

    @property
    def columns(self) -> tuple[int, int]:
        """Where B and C begin in what a pixel was projected to; without projection they are arrays of their own."""
        return (0, self.state) if self.rank else (0, 0)

    @property
    def square(self) -> int:
        """The rank, as a side of a matrix that Triton multiplies."""
        return max(walks.MATRIX_SIDE, power_of_two(self.rank))

    @property
    def keeps_chunks(self) -> bool:
        """Whether some chunk begins with a state that only a walk from the start can tell."""
        return self.chunks > 1 or self.chained


def plan_program(
    table: WalkTable, *, channels: int, state: int, rank: int, softplus: bool, gradient: bool, interpret: bool
) -> Program:
    """Choose a program's schedule.

    Args:
        table: its walks.
        channels: of the image, or of a group.
        state: N.
        rank: R; 0 where step sizes are given.
        softplus: whether step sizes go through it.
        gradient: the backward program.
        interpret: run anywhere, slowly.
    """
    state = power_of_two(state)
    _, count, tokens = table.tokens.shape
    # More would fill the registers with states, or with columns of the projection.
    tokens_a_turn = 8 if state <= 2 and rank <= 16 else 4
    if gradient and state > 4:
        tokens_a_turn = 2
    lengths = table.rows[..., walks.LENGTH]
    if tokens_a_turn == 8 and (lengths % 8).any() and not (lengths % 4).any():
        tokens_a_turn = 4  # no fillers
    if interpret:
        tokens_a_turn = 2  # nothing to wait for, and a fourth of the program to compile
    # A program keeps a state for each turn of one chunk, and one for each chunk. This bounds the former.
    chunk = min(tokens, max(walks.MATRIX_SIDE, 512 * tokens_a_turn // state))
    # A row of two channels a thread is read and written by half as many instructions, of twice the bytes. With a
    # projection their weights would fill the registers; and sums over channels are of one a thread.
    pairs = state == 1 and not rank and not gradient and not channels % (2 * WIDTH)
    width = 2 * WIDTH if pairs else WIDTH
    return Program(
        width=width,
        channels=channels,
        blocks=-(-channels // width),
        state=state,
        rank=rank,
        softplus=softplus,
        walks=count,
        tokens_a_turn=tokens_a_turn,
        chunk=chunk,
        chunks=-(-tokens // chunk),
        merges=table.merges,
        remerges=table.remerges,
        chained=table.chained,
        all_pixels=table.only_pixels and bool((lengths > 0).all()) and not (lengths % tokens_a_turn).any(),
        # So three warps fit on each of a multiprocessor's four schedulers, which has 16384 registers. Weights for
        # more columns of the step size would not leave enough of them.
        registers=168 if gradient and rank <= 32 else None,
        gradient=gradient,
        interpret=interpret,
    )
