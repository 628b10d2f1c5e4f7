"""``scan2d`` as a problem for the kernels: orders over images."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import sum_over
from pallas_kernels.tpu.geometry import Grid, Launch, grids
from pallas_kernels.tpu.kernels import LOG2E, TILE
from pallas_kernels.tpu.launch import Shape, Target
from pallas_kernels.tpu.problem import Arrays, Lanes, Problem, backward, forward, pad, target, up, wrong_dtype


@dataclasses.dataclass(frozen=True)
class _Images:
    """The sizes of a call of ``scan2d``, and how they are brought into the kernels' form and back."""

    batch: int
    height: int
    width: int
    channels: int
    state: int
    rank: int
    grid: Grid
    lanes: Lanes
    axes: tuple[str, ...]  # of the mesh, over which the channels of the image are divided

    @property
    def lattice(self) -> tuple[int, int]:
        """Rows and columns of a sub-lattice, padding included."""
        rows, columns = -(-self.height // self.grid.step[0]), -(-self.width // self.grid.step[1])
        if rows == 1 and columns > 256:
            # For a length that can be cut. The pixels behind the last are 0: they write nothing to a state, and what
            # they read from it is dropped.
            columns = up(columns, 32)
        return rows, columns

    @property
    def wide(self) -> int:
        """Channels, with those that fill the last tile."""
        return up(self.channels, TILE)

    def shape(self, dtype: Any, result: Any) -> Shape:
        """Return the shape of its launches."""
        rows, columns = self.lattice
        return Shape(
            rows=rows,
            columns=columns,
            step=self.grid.step,
            channels=self.wide // self.lanes.slices,
            images=self.lanes.slices * self.lanes.images,
            state=self.state,
            # The weights of a projection differ from slice to slice, which no product of the matrix unit can have.
            rank=self.rank if self.lanes.slices == 1 else 0,
            slots=self.grid.slots,
            softplus=True,
            dtype=dtype,
            result=result,
        )

    def image(self, x: jax.Array) -> jax.Array:
        """Bring (B, H, W, E) to (rows, step, columns, step, E, B)."""
        (rows, columns), (down, right) = self.lattice, self.grid.step
        x = pad(pad(pad(x, 1, rows * down), 2, columns * right), 3, self.wide)
        return jnp.moveaxis(x.reshape(x.shape[0], rows, down, columns, right, self.wide), 0, -1)

    def back(self, x: jax.Array) -> jax.Array:
        """Bring the kernels' form back to (B, H, W, E)."""
        x = jnp.moveaxis(self.lanes.unfold(x, self.batch), -1, 0)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], x.shape[5])
        return x[:, : self.height, : self.width, : self.channels]

    def prepare(self, x, x_weight, dt_weight, dt_bias, A, D) -> dict[str, Any]:
        """Return what the kernels read."""
        f32 = jnp.float32
        x_weight = pad(x_weight.astype(x.dtype), 1, self.wide)
        # Time steps in units of ln 2: their bias and weights here, B below.
        dt_weight = pad(LOG2E * dt_weight.astype(f32), 2, self.wide)
        dt_bias = pad(LOG2E * dt_bias.astype(f32), 1, self.wide)
        A, D = pad(A.astype(f32), 1, self.wide), pad(D.astype(f32), 1, self.wide)
        image = self.image(x)
        shape = self.shape(x.dtype, x.dtype)

        def of_lattices(parameter, row):
            """Gather (K, ...) as (step, step, slots, ...), zeros where a sub-lattice has fewer sets."""
            sets = jnp.asarray([[[*s, *[len(parameter)] * (self.grid.slots - len(s))] for s in r] for r in row])
            return jnp.concatenate([parameter, jnp.zeros_like(parameter[:1])])[sets]

        used, late = (x_weight, None) if shape.rank else (x_weight[..., self.rank :], x_weight[..., : self.rank])
        used = pad(used, 2, shape.set_rows)

        def project(weights):
            sets = of_lattices(weights, self.grid.sets)
            own = jnp.einsum("hiwjeb,ijkec->hiwjkcb", image, sets, preferred_element_type=f32)
            return sum_over(self.axes, own)

        packed = project(used)
        is_B = (np.arange(shape.set_rows) >= shape.rank) & (np.arange(shape.set_rows) < shape.rank + self.state)
        packed *= np.where(is_B, 1 / LOG2E, 1.0).astype(np.float32)[:, None]
        packed = packed.reshape(*packed.shape[:4], -1, packed.shape[-1])
        images = {"x": self.lanes.fold(image), "packed": self.lanes.repeat(packed)}
        if late is not None:
            delta = jnp.einsum(
                "hiwjkrb,ijkre->hiwjkeb",
                project(late),
                of_lattices(dt_weight, self.grid.sets),
                precision=jax.lax.Precision.HIGHEST,
            )
            images["delta"] = self.lanes.fold(delta)
        return {
            "image": images,
            "launches": [self._parameters(part, dt_weight, dt_bias, A, D) for part in self.grid.launches],
        }

    def _parameters(self, part: Launch, dt_weight, dt_bias, A, D) -> Arrays:
        """Return the parameters of a launch, (lattices, sets, ...)."""
        numbers = jnp.asarray([self.grid.sets[i][j] for i, j in part.origins])
        visits = jnp.asarray([float(len(walk.orders)) for walk in part.walks])[:, None]  # of each pixel

        def spread(parameter):
            return pad(self.lanes.spread(parameter[numbers]), 1, self.grid.slots)

        values = {
            "A": spread(A.swapaxes(1, 2)),
            "bias": spread(dt_bias),
            "skip": self.lanes.spread((visits * D[numbers]).sum(1)),
        }
        if self.lanes.slices == 1:
            weights = pad(dt_weight, 1, up(self.rank, TILE)).swapaxes(1, 2)
            values["weights"] = pad(weights[numbers], 1, self.grid.slots)
        return values


def _problems(x, dt_weight, A, orders, axes, target: Target, *, gradient: bool) -> list[tuple[_Images, Problem]] | str:
    """Return one problem for each step among the orders, or why there is none."""
    sorted_orders = grids(orders)
    if isinstance(sorted_orders, str):
        return f"they cannot walk {sorted_orders}"
    batch, height, width, channels = x.shape

    def planned(result) -> list[tuple[_Images, Problem]] | str:
        problems = []
        for grid in sorted_orders:
            images = _Images(
                batch,
                height,
                width,
                channels,
                A.shape[2],
                dt_weight.shape[1],
                grid,
                Lanes.of(batch, up(channels, TILE)),
                axes,
            )
            problem = Problem.of(grid, images.shape(x.dtype, result), target, gradient=gradient)
            if problem is None:
                return f"an image of {height}x{width} does not fit the chip's {target.vmem // 2**20} MiB of VMEM"
            problems.append((images, problem))
        return problems

    problems = planned(x.dtype)
    if not isinstance(problems, str) and (len(problems) > 1 or problems[0][1].layers > 1):
        problems = planned(jnp.float32)  # sums are not rounded in between
    return problems


def scan2d_unsupported(x, x_weight, dt_weight, dt_bias, A, D, *, orders, axes=()) -> str | None:
    """Return why no kernel can do a call of ``scan2d`` and its gradient, or None."""
    wrong = wrong_dtype(x, x_weight, dt_weight, dt_bias, A, D)
    if wrong:
        return wrong
    for gradient in (False, True):
        problems = _problems(x, dt_weight, A, orders, axes, target(), gradient=gradient)
        if isinstance(problems, str):
            return problems
    return None


def scan2d_forward(x, x_weight, dt_weight, dt_bias, A, D, *, orders, axes=(), interpret: Any = None) -> jax.Array:
    """Return y of ``scan2d``, whose arguments these are."""
    results = []
    problems = _problems(x, dt_weight, A, orders, axes, target(interpret), gradient=False)
    assert not isinstance(problems, str), problems
    for images, problem in problems:
        y = forward(problem, images.prepare(x, x_weight, dt_weight, dt_bias, A, D))["y"]
        results.append(images.back(y))
    return functools.reduce(jnp.add, results).astype(x.dtype)


def scan2d_backward(
    x, x_weight, dt_weight, dt_bias, A, D, dy, *, orders, axes=(), interpret: Any = None
) -> tuple[jax.Array, ...]:
    """Return the gradients of the six arrays from that of y."""
    results = []
    problems = _problems(x, dt_weight, A, orders, axes, target(interpret), gradient=True)
    assert not isinstance(problems, str), problems
    for images, problem in problems:
        inputs, pull = jax.vjp(images.prepare, x, x_weight, dt_weight, dt_bias, A, D)
        results.append(pull(backward(problem, inputs, {"dy": images.lanes.fold(images.image(dy))})))
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), results)
