"""``scan2d`` as a problem for the kernels: orders over images."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.contract import LOG2E
from pallas_kernels.dispatch import Kernels, sum_over
from pallas_kernels.orders import Chain, Order
from pallas_kernels.tpu.blocks import FLOAT32, Maths, Shape
from pallas_kernels.tpu.chip import SUBLANES, Chip, current_chip, round_up
from pallas_kernels.tpu.geometry import Grid, Launch, grids
from pallas_kernels.tpu.lanes import Lanes, pad
from pallas_kernels.tpu.problem import Arrays, Problem, backward, forward, wrong_dtype


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
    def lattice_shape(self) -> tuple[int, int]:
        """Rows and columns of a sub-lattice, padding included."""
        rows, columns = -(-self.height // self.grid.step[0]), -(-self.width // self.grid.step[1])
        if rows == 1 and columns > 256:
            # For a length that can be cut. The pixels behind the last are 0: they write nothing to a state, and what
            # they read from it is dropped.
            columns = round_up(columns, 32)
        return rows, columns

    @property
    def wide(self) -> int:
        """Channels, with those that fill the last tile."""
        return round_up(self.channels, SUBLANES)

    def shape(self, dtype: Any, result: Any) -> Shape:
        """Return the shape of its launches."""
        rows, columns = self.lattice_shape
        return Shape(
            rows=rows,
            columns=columns,
            step=self.grid.step,
            channels=self.wide // self.lanes.slices,
            images=self.lanes.slices * self.lanes.images,
            slots=self.grid.slots,
            maths=Maths(
                state=self.state,
                # The weights of a projection differ from slice to slice, which no product of the matrix unit can have.
                rank=self.rank if self.lanes.slices == 1 else 0,
                softplus=True,
                natural=False,
                exact=dtype == FLOAT32,
            ),
            dtype=dtype,
            result=result,
        )

    def image(self, x: jax.Array) -> jax.Array:
        """Bring (B, H, W, E) to (rows, step, columns, step, E, B)."""
        (rows, columns), (down, right) = self.lattice_shape, self.grid.step
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
        maths = self.shape(x.dtype, x.dtype).maths

        def of_lattices(parameter, row):
            """Gather (K, ...) as (step, step, slots, ...), zeros where a sub-lattice has fewer sets."""
            sets = jnp.asarray([[[*s, *[len(parameter)] * (self.grid.slots - len(s))] for s in r] for r in row])
            return jnp.concatenate([parameter, jnp.zeros_like(parameter[:1])])[sets]

        used, late = (x_weight, None) if maths.rank else (x_weight[..., self.rank :], x_weight[..., : self.rank])
        used = pad(used, 2, maths.set_rows)

        def project(weights):
            sets = of_lattices(weights, self.grid.sets)
            own = jnp.einsum("hiwjeb,ijkec->hiwjkcb", image, sets, preferred_element_type=f32)
            return sum_over(self.axes, own)

        packed = project(used)
        is_B = (np.arange(maths.set_rows) >= maths.rank) & (np.arange(maths.set_rows) < maths.rank + self.state)
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
            weights = pad(dt_weight, 1, round_up(self.rank, SUBLANES)).swapaxes(1, 2)
            values["weights"] = pad(weights[numbers], 1, self.grid.slots)
        return values


@dataclasses.dataclass(frozen=True)
class Plan:
    """What both passes of a call of ``scan2d`` do: a problem for each step among the orders."""

    forward: tuple[tuple[_Images, Problem], ...]
    backward: tuple[tuple[_Images, Problem], ...]


def plan(x, x_weight, dt_weight, dt_bias, A, D, *, orders, axes=(), interpret: Any = None) -> Plan | str:
    """Plan a call of ``scan2d`` and its gradient; a string says why the kernels cannot do it."""
    wrong = wrong_dtype(x, x_weight, dt_weight, dt_bias, A, D)
    sizes = {"rank": dt_weight.shape[1], "state": A.shape[2]}
    return wrong or _plan(x.shape, x.dtype, orders, axes, current_chip(interpret), **sizes)


# The forward and the backward pass are lowered one by one, and both ask for the plan.
@functools.lru_cache
def _plan(
    shape: tuple[int, ...],
    dtype: Any,
    orders: tuple[Order | Chain, ...],
    axes: tuple[str, ...],
    chip: Chip,
    *,
    rank: int,
    state: int,
) -> Plan | str:
    by_step = grids(orders)
    if isinstance(by_step, str):
        return f"they cannot walk {by_step}"
    batch, height, width, channels = shape
    lanes = Lanes.of(batch, round_up(channels, SUBLANES))
    images = [_Images(batch, height, width, channels, state, rank, grid, lanes, axes) for grid in by_step]

    def problems(result, *, gradient: bool) -> tuple[tuple[_Images, Problem], ...] | None:
        found = [(own, Problem.of(own.grid, own.shape(dtype, result), chip, gradient=gradient)) for own in images]
        fitting = tuple((own, problem) for own, problem in found if problem)
        if len(fitting) < len(found):
            return None
        several = len(fitting) > 1 or fitting[0][1].layers > 1
        if several and result != FLOAT32:  # sums are not rounded in between
            return problems(FLOAT32, gradient=gradient)
        return fitting

    there, back = (problems(dtype, gradient=gradient) for gradient in (False, True))
    if there is None or back is None:
        return f"an image of {height}x{width} does not fit the chip's {chip.vmem // 2**20} MiB of VMEM"
    return Plan(there, back)


def _forward(plan: Plan, arrays) -> tuple[jax.Array]:
    """Return y of ``scan2d`` from its six arrays."""
    x = arrays[0]
    results = [images.back(forward(problem, images.prepare(*arrays))["y"]) for images, problem in plan.forward]
    return (functools.reduce(jnp.add, results).astype(x.dtype),)


def _backward(plan: Plan, arrays, cotangents) -> tuple[jax.Array, ...]:
    """Return the gradients of the six arrays from that of y."""
    (dy,) = cotangents
    results = []
    for images, problem in plan.backward:
        inputs, pull = jax.vjp(images.prepare, *arrays)
        results.append(pull(backward(problem, inputs, {"dy": images.lanes.fold(images.image(dy))})))
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), results)


SCAN2D = Kernels(plan, _forward, _backward)
