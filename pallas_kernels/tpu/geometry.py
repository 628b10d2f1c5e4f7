"""From orders to addresses: which sub-lattices a launch of a kernel covers, and how its walks step through a block.

A kernel sees one sub-lattice of the image at a time, as a block of (rows, columns, channels, images). There a walk is
arithmetic: ``base + outer * outer_step + inner * inner_step`` counts pixels of the block, and the base and both steps
are constants of the program. So no order costs a copy, and the compiler may reorder the memory accesses of neighbouring
tokens.

The words, from large to small: the orders of one call that have the same step make a ``Grid``. Its sub-lattices that
are walked alike make a ``Launch``. Each scan along such a sub-lattice is a ``Walk``, and each order of a walk (a chain
has several) is a ``Segment`` of a block.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels.orders import Chain, Order


@dataclasses.dataclass(frozen=True)
class Segment:
    """The way of one order through a block of pixels: ``outer`` lines of ``inner`` tokens each.

    Token i of line o is the pixel ``base + o * outer_step + i * inner_step``, pairs of (row, column).
    """

    outer: int
    inner: int
    base: tuple[int, int]
    outer_step: tuple[int, int]
    inner_step: tuple[int, int]

    @classmethod
    def of(cls, column_major: bool, reverse: bool, rows: int, columns: int, *, flat: bool) -> "Segment":
        """Return the walk by rows or by columns, from the first pixel or from the last.

        ``flat`` says that the block has all its pixels, row by row, on its first axis.
        """
        sign = -1 if reverse else 1
        if flat:
            base = (rows * columns - 1 if reverse else 0, 0)
            if column_major and min(rows, columns) > 1:
                return cls(columns, rows, base, (sign, 0), (sign * columns, 0))
            return cls(1, rows * columns, base, (0, 0), (sign, 0))
        base = (rows - 1, columns - 1) if reverse else (0, 0)
        if column_major:
            return cls(columns, rows, base, (0, sign), (sign, 0))
        return cls(rows, columns, base, (sign, 0), (0, sign))

    def pixels(self, line, number, count: int, first: int = 0) -> Callable[[int], tuple]:
        """Return the function from i to the pixel of token ``first + number * count + i`` of a line, for i below count.

        Its addresses are sums and products of counts from zero up, which the compiler folds into the accesses; from
        differences it computes every one anew.
        """

        groups = (self.inner - first) // count

        def place(axis: int, i: int):
            base, outer, inner = (pair[axis] for pair in (self.base, self.outer_step, self.inner_step))
            result, constant = 0, base + inner * (first + i)
            for step, index, size in ((outer, line, self.outer), (inner * count, number, groups)):
                if step < 0:  # from the other end
                    constant += step * (size - 1)
                    index = _from_end(size, index, alone=step == -1 and groups == 1)
                if step:
                    result += abs(step) * index
            return result + constant

        return lambda i: (place(0, i), place(1, i))


@dataclasses.dataclass(frozen=True)
class Walk:
    """What one scan does on a sub-lattice: a state of its own, the parameters ``slot``, the orders it walks."""

    slot: int  # which of the sub-lattice's parameter sets
    orders: tuple[tuple[bool, bool], ...]  # (column_major, reverse), one after another; only a chain has several


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel: sub-lattices of one step that are all walked alike."""

    origins: tuple[tuple[int, int], ...]
    walks: tuple[Walk, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """All orders of one step, over the image seen as (rows, step, columns, step).

    ``sets[i][j]`` lists the parameter sets of the sub-lattice of origin (i, j), in the order of the slots.
    """

    step: tuple[int, int]
    sets: tuple[tuple[tuple[int, ...], ...], ...]
    launches: tuple[Launch, ...]

    @property
    def slots(self) -> int:
        """The largest number of parameter sets that a sub-lattice has."""
        return max(len(sets) for row in self.sets for sets in row)

    @property
    def whole(self) -> bool:
        """Whether every pixel is visited."""
        return all(sets for row in self.sets for sets in row)


def grids(orders: tuple[Order | Chain, ...]) -> tuple[Grid, ...] | str:
    """Sort orders by step, sub-lattice and way of walking; a string says why a kernel cannot walk them."""
    by_step: dict[tuple[int, int], dict[tuple[int, int], list[tuple[int, tuple[tuple[bool, bool], ...]]]]] = {}
    for number, order in enumerate(orders):
        parts = order.orders
        first = parts[0]
        if any((part.step, part.origin) != (first.step, first.origin) for part in parts):
            return "a chain that leaves its sub-lattice"
        ways = tuple((part.column_major, part.reverse) for part in parts)
        by_step.setdefault(first.step, {}).setdefault(first.origin, []).append((number, ways))
    result = []
    for step, lattices in by_step.items():
        sets = tuple(
            tuple(tuple(number for number, _ in lattices.get((i, j), ())) for j in range(step[1]))
            for i in range(step[0])
        )
        alike: dict[tuple[Walk, ...], list[tuple[int, int]]] = {}
        for origin, visits in sorted(lattices.items()):
            walks = tuple(Walk(slot, ways) for slot, (_, ways) in enumerate(visits))
            alike.setdefault(walks, []).append(origin)
        launches = tuple(Launch(tuple(origins), walks) for walks, origins in alike.items())
        result.append(Grid(step, sets, launches))
    return tuple(result)


def for_tokens(segment: Segment, size: int, body: Callable, carry=0, *, backwards: bool = False):
    """Run ``body(t, pixel, count, carry) -> carry`` over a segment in groups of ``count`` tokens, at most ``size``.

    Token ``t + i`` of the segment, for i below count, is the pixel ``pixel(i)`` of the block. Groups never cross the
    end of a line; count is a number, t and pixels are traced. ``backwards`` takes the groups in the opposite order.
    """
    count = group_size(segment.inner, size)
    whole, rest = divmod(segment.inner, count)

    def at(line, number, n, first, carry):
        t = line * segment.inner + first + number * n
        return body(t, segment.pixels(line, number, n, first), n, carry)

    def one_line(line, carry):
        def group(i, carry):
            return at(line, whole - 1 - i if backwards else i, count, 0, carry)

        if rest and backwards:
            carry = at(line, 0, rest, whole * count, carry)
        carry = group(0, carry) if whole == 1 else lax.fori_loop(0, whole, group, carry)
        if rest and not backwards:
            carry = at(line, 0, rest, whole * count, carry)
        return carry

    if segment.outer == 1:
        return one_line(0, carry)

    def nth_line(i, carry):
        return one_line(_from_end(segment.outer, i, alone=whole == 1) if backwards else i, carry)

    return lax.fori_loop(0, segment.outer, nth_line, carry)


def _from_end(size: int, index, *, alone: bool):
    """Return the index counted from the other end; ``alone`` says that one step of it is a whole turn of a loop."""
    index = size - 1 - index
    # max(index, 0) is an optimisation barrier. Without it the compiler rewrites ``size - 1 - i``, can no longer prove
    # that neighbouring loads and stores differ, and lets each load wait for the store before it.
    return jnp.maximum(index, 0) if alone else index


def group_size(length: int, size: int) -> int:
    """Return how many of ``length`` tokens to handle at once, at most ``size``: few groups, few tokens left over."""
    # A group left over is as slow to start as a whole one, and its code is a copy.
    return min(range(1, min(size, length) + 1), key=lambda n: (-(-length // n) + (length % n > 0), -n))
