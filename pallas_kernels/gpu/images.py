"""``scan2d`` on a GPU: its image and its projections in the kernels' form, and back."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.contract import LOG2E
from pallas_kernels.dispatch import Kernels, sum_over
from pallas_kernels.gpu import walks
from pallas_kernels.gpu.arrays import Arrays
from pallas_kernels.gpu.call import run
from pallas_kernels.gpu.form import fill, fill_states, sum_layers, unsupported
from pallas_kernels.gpu.program import WIDTH, Program, plan_program, power_of_two
from pallas_kernels.gpu.split_matmul import product
from pallas_kernels.gpu.walks import WalkTable, sublattice, walk_table
from pallas_kernels.orders import Chain, Order

# Programs, of one warp each, that keep a large GPU busy: two for each scheduler of its 132 multiprocessors.
ENOUGH = 1056


@dataclasses.dataclass(frozen=True)
class Plan:
    """What both passes of a call of ``scan2d`` do."""

    orders: tuple[Order | Chain, ...]
    axes: tuple[str, ...]  # of the mesh, over which the channels of the image are divided
    table: WalkTable
    forward: Program
    backward: Program


def plan(x, x_weight, dt_weight, dt_bias, A, D, *, orders, axes=(), interpret: bool = False) -> Plan | str:
    """Plan a call of ``scan2d`` and its gradient; a string says why the kernels cannot do it."""
    images, height, width, channels = x.shape
    parameters = x_weight, dt_weight, dt_bias, A, D
    wrong = unsupported(A.shape[2], height * width, interpret, x, *parameters)
    if wrong:
        return wrong
    programs = images * -(-channels // WIDTH)  # if each does all the walks of its channels
    table = walk_table(tuple(orders), height, width, apart=programs < ENOUGH)
    sizes = {"channels": channels, "state": A.shape[2], "rank": dt_weight.shape[1], "softplus": True}
    there, back = (plan_program(table, **sizes, gradient=gradient, interpret=interpret) for gradient in (False, True))
    return Plan(tuple(orders), tuple(axes), table, there, back)


def _forward(plan: Plan, arrays) -> tuple[jax.Array]:
    """Return y of ``scan2d`` from its six arrays."""
    x, *parameters = arrays
    inputs = _prepare(plan, x.dtype, x.astype(jnp.float32), *parameters)
    # Where something is added to y yet, it is rounded after that.
    dtype = jnp.float32 if plan.table.merges or plan.table.layers > 1 else x.dtype
    of = run(plan.table, plan.forward, {"x": _flat(x), **inputs}, dtype)
    return (sum_layers(of["y"]).reshape(x.shape).astype(x.dtype),)


def _backward(plan: Plan, arrays, cotangents) -> tuple[jax.Array, ...]:
    """Return the gradients of the six arrays from that of y."""
    (x, *parameters), (dy,) = arrays, cotangents
    inputs, pull = jax.vjp(functools.partial(_prepare, plan, x.dtype), x.astype(jnp.float32), *parameters)
    of = run(plan.table, plan.backward, inputs | {"x": _flat(x), "dy": _flat(dy)})
    gradients = {name: of[f"d_{name}"].sum(0) for name in ("packed", "weights", "bias", "A", "D")}
    projected, *others = pull(gradients | {"packed": fill(gradients["packed"], 3, inputs["packed"].shape[3])})
    return (projected + sum_layers(of["dx"]).reshape(x.shape)).astype(x.dtype), *others


SCAN2D = Kernels(plan, _forward, _backward)


def _flat(image: jax.Array) -> jax.Array:
    """Bring an image (B, H, W, E) into the form of ``run``."""
    return image.reshape(image.shape[0], -1, 1, image.shape[3])


def _prepare(plan: Plan, dtype, x, x_weight, dt_weight, dt_bias, A, D) -> Arrays:
    """Return what ``run`` takes beside the image, which is float32 here; its values are of ``dtype``."""
    x_weight, dt_weight, dt_bias, A, D = (a.astype(jnp.float32) for a in (x_weight, dt_weight, dt_bias, A, D))
    rank, state = dt_weight.shape[1], A.shape[2]
    low, B, C = jnp.split(x_weight, [rank, rank + state], -1)
    x_weight = jnp.concatenate([fill_states(B), fill_states(C), low], -1)
    x_weight = fill(x_weight, -1, -(-x_weight.shape[-1] // 4) * 4)  # so that four neighbours are one read
    return {
        "packed": sum_over(plan.axes, _project(plan.table, plan.orders, dtype, x, x_weight)),
        "weights": fill(dt_weight, 1, max(walks.MATRIX_SIDE, power_of_two(rank))),
        "bias": dt_bias,
        "A": fill_states(A.swapaxes(1, 2), 1) * LOG2E,
        "D": D,
    }


def _project(table: WalkTable, orders, dtype, x: jax.Array, x_weight: jax.Array) -> jax.Array:
    """Return (B, H * W, slots, 2N + R): what each pixel is projected to for the orders that visit it."""
    images, height, width, channels = x.shape
    sublattices = [sublattice(order) for order in orders]
    if all(own == Order() for own in sublattices):
        # One product; every set has a slot of its own.
        rows = product(x.reshape(-1, channels), jnp.concatenate(list(x_weight), 1), dtype)
        return rows.reshape(images, height * width, len(orders), -1)
    parts: list[Any] = [0] * table.slots
    for k, own in enumerate(sublattices):
        pixels = own.read(x)
        rows = product(pixels.reshape(-1, channels), x_weight[k], dtype).reshape(*pixels.shape[:2], -1)
        parts[table.slot_of[k]] = parts[table.slot_of[k]] + own.write(rows, height, width)
    packed = jnp.stack(parts, 3)
    return packed.reshape(images, height * width, *packed.shape[3:])
