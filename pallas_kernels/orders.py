"""Scan orders as data: which pixels of an image a sequence visits, and in which order.

An order is a sub-lattice of the grid (every ``step``-th row and column from ``origin`` on), a way to walk it (row by
row or column by column) and a sense. The image is first padded with zeros at the bottom and the right to a multiple of
the step, as EfficientVMamba does, so that every sub-lattice of one step has the same length; a token that falls into
the padding is a zero, and what the scan writes there is cut off again.

Reading and writing are slices, transposes and flips, never a gather by index arrays, which is slow on a TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Order:
    """One walk over the pixels of an image.

    Attributes:
        origin: (row, column) of the first pixel of the sub-lattice, each below the step.
        step: (rows, columns) between neighbours of the sub-lattice, at least 1.
        column_major: walk column by column instead of row by row.
        reverse: walk from the last pixel to the first.

    Raises:
        ValueError: a step below 1, or an origin outside [0, step).
    """

    origin: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    column_major: bool = False
    reverse: bool = False

    def __post_init__(self):
        for name, pair in (("step", self.step), ("origin", self.origin)):
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(n, int) for n in pair)):
                raise ValueError(f"Order: {name}={pair!r} must be a tuple of two integers, (rows, columns)")
        if min(self.step) < 1:
            raise ValueError(f"Order: step={self.step} must be at least 1 in both directions")
        if not all(0 <= origin < step for origin, step in zip(self.origin, self.step, strict=True)):
            raise ValueError(f"Order: origin={self.origin} must lie in [0, step) for step={self.step}")

    @property
    def orders(self) -> tuple["Order", ...]:
        """This order alone: so that whoever walks an order or a ``Chain`` need not ask which it is."""
        return (self,)

    def lattice(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the sub-lattice of a (height, width) grid, padding included."""
        return -(-height // self.step[0]), -(-width // self.step[1])

    def length(self, height: int, width: int) -> int:
        """Return the number of tokens on a (height, width) grid, padding included."""
        rows, columns = self.lattice(height, width)
        return rows * columns

    def read(self, image: jax.Array) -> jax.Array:
        """Return the sequence (B, L, ...) of an image (B, H, W, ...), with zeros for tokens in the padding."""
        height, width = image.shape[1:3]
        rows, columns = self.lattice(height, width)
        bottom, right = rows * self.step[0] - height, columns * self.step[1] - width
        if bottom or right:
            image = jnp.pad(image, [(0, 0), (0, bottom), (0, right)] + [(0, 0)] * (image.ndim - 3))
        lattice = image[:, self.origin[0] :: self.step[0], self.origin[1] :: self.step[1]]
        if self.column_major:
            lattice = lattice.swapaxes(1, 2)
        sequence = lattice.reshape(lattice.shape[0], rows * columns, *image.shape[3:])
        return jnp.flip(sequence, 1) if self.reverse else sequence

    def write(self, sequence: jax.Array, height: int, width: int) -> jax.Array:
        """Return the image (B, height, width, ...) with each token of (B, L, ...) at its pixel, zeros elsewhere."""
        rows, columns = self.lattice(height, width)
        if self.reverse:
            sequence = jnp.flip(sequence, 1)
        shape = (columns, rows) if self.column_major else (rows, columns)
        lattice = sequence.reshape(sequence.shape[0], *shape, *sequence.shape[2:])
        if self.column_major:
            lattice = lattice.swapaxes(1, 2)
        # (before, after, between) for each axis; a negative "after" cuts off the padding.
        spread = [
            (origin, size - origin - (count - 1) * step - 1, step - 1)
            for origin, size, count, step in zip(self.origin, (height, width), (rows, columns), self.step, strict=True)
        ]
        still = [(0, 0, 0)]
        return lax.pad(lattice, jnp.zeros((), lattice.dtype), still + spread + still * (lattice.ndim - 3))

    def indices(self, height: int, width: int) -> np.ndarray:
        """Return the flat pixel index ``row * width + column`` of every token (L,), or -1 where it is padding."""
        rows, columns = self.lattice(height, width)
        row = self.origin[0] + self.step[0] * np.arange(rows)[:, None]
        column = self.origin[1] + self.step[1] * np.arange(columns)
        flat = np.where((row < height) & (column < width), row * width + column, -1)
        walk = flat.T.ravel() if self.column_major else flat.ravel()
        return walk[::-1] if self.reverse else walk


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several orders walked one after another by a single scan, whose state runs on from each into the next.

    A pixel that two of them visit is read twice, and what the scan writes there is summed.

    Attributes:
        orders: the walks, at least one, in the order of time.

    Raises:
        ValueError: no orders.
        TypeError: no tuple, or an entry that is no Order.

    Source: YuHengsss/MSVMamba, whose three low-resolution scans are one sequence.
    """

    orders: tuple[Order, ...]

    def __post_init__(self):
        if not isinstance(self.orders, tuple):
            raise TypeError(f"Chain: orders must be a tuple of Order values, got {type(self.orders).__name__}")
        if not self.orders:
            raise ValueError("Chain: orders is empty; give at least one Order")
        for order in self.orders:
            if not isinstance(order, Order):
                raise TypeError(f"Chain: orders must hold Order values, got {type(order).__name__}")

    def length(self, height: int, width: int) -> int:
        """Return the number of tokens on a (height, width) grid, padding included."""
        return sum(order.length(height, width) for order in self.orders)

    def read(self, image: jax.Array) -> jax.Array:
        """Return the sequence (B, L, ...) of an image (B, H, W, ...), with zeros for tokens in the padding."""
        return jnp.concatenate([order.read(image) for order in self.orders], 1)

    def write(self, sequence: jax.Array, height: int, width: int) -> jax.Array:
        """Return the image (B, height, width, ...) with each token of (B, L, ...) added to its pixel."""
        borders = np.cumsum([order.length(height, width) for order in self.orders])[:-1].tolist()
        parts = jnp.split(sequence, borders, axis=1)
        images = (order.write(part, height, width) for order, part in zip(self.orders, parts, strict=True))
        return functools.reduce(jnp.add, images)

    def indices(self, height: int, width: int) -> np.ndarray:
        """Return the flat pixel index ``row * width + column`` of every token (L,), or -1 where it is padding."""
        return np.concatenate([order.indices(height, width) for order in self.orders])


# VMamba's cross-scan: the whole grid by rows, by columns, and both backwards. Source: VMamba, section 4.3.
CROSS = (
    Order(),
    Order(column_major=True),
    Order(reverse=True),
    Order(column_major=True, reverse=True),
)

# EfficientVMamba's atrous scan (ES2D): four sub-lattices of step 2, those on odd rows by columns; each pixel once.
# Source: TerryPei/EfficientVMamba, classification/models/vmamba_efficient.py, EfficientScan.
ATROUS = (
    Order(origin=(0, 0), step=(2, 2)),
    Order(origin=(1, 0), step=(2, 2), column_major=True),
    Order(origin=(0, 1), step=(2, 2)),
    Order(origin=(1, 1), step=(2, 2), column_major=True),
)
