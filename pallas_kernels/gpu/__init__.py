"""The scans as GPU kernels: what ``scan_1d.py`` and ``scan_2d.py`` call on an NVIDIA GPU.

Why Triton, through Pallas. Of the two ways from Pallas to a GPU, Mosaic GPU is for Hopper and newer only; on an A100
there is Triton, or CUDA, with a compiler and a binary for every release of CUDA and Python. Pallas for Triton is
deprecated since JAX 0.11, but JAX 0.12 has it, and it compiles the scans for the A100, H100 and H200 alike
(``benchmarks/results/gpu_compile.md`` lists the registers). And the scan needs nothing that only Mosaic GPU has: it
multiplies no large matrices, and a program is one warp, which waits for no other. So that another way can be taken when
this one ends, all that depends on it is in ``backend.py``; ``kernels.py`` is the maths, ``walks.py`` the orders, and
``launch.py`` cuts the work into programs.

What is not the recurrence stays in XLA: the projection to step size, B and C, once for each pixel that an order visits,
its sum over devices that share the channels, and sums of what several programs find for one array, over images or
blocks of channels. The gradient of the projection is JAX's own, but for its products; the kernels have gradients
written by hand, and keep nothing from the forward pass but its inputs.
Under ``jax.shard_map``, all arguments must vary over the same axes; ``sequential.py`` shows how to mark them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import sum_over
from pallas_kernels.gpu.backend import in_sight
from pallas_kernels.gpu.kernels import LOG2E, power_of_two
from pallas_kernels.gpu.launch import Arrays, programs, run
from pallas_kernels.gpu.walks import TILE, Plan, lattice, plan, sequences
from pallas_kernels.orders import Chain, Order

# Programs, of one warp each, that keep a large GPU busy: two for each scheduler of its 132 multiprocessors.
ENOUGH = 1056


def scan2d_unsupported(x, *parameters, orders, axes=()) -> str | None:
    """Return why no kernel can do a call of ``scan2d`` and its gradient, or None."""
    *_, A, _ = parameters
    return _unsupported(A.shape[2], x.shape[1] * x.shape[2], x, *parameters)


def selective_scan_unsupported(u, delta, A, *others, delta_softplus, reverse) -> str | None:
    """Return why no kernel can do a scan in the form of ``terms.py`` and its gradient, or None."""
    return _unsupported(A.shape[1], u.shape[1], u, delta, A, *others)


def _unsupported(state: int, length: int, image: jax.Array, *others: jax.Array) -> str | None:
    if not in_sight():
        return "there is no GPU to compile for; describe one with jax.set_mesh or jax.sharding.use_abstract_mesh"
    if image.dtype not in (jnp.float32, jnp.bfloat16):
        return f"they take float32 and bfloat16, not {image.dtype}"
    if any(x.dtype == jnp.float64 for x in others):
        return "they do not take float64"
    if state > 32:
        return f"they take a state of up to 32, not {state}"
    return f"they take up to 65536 tokens, not {length}" if length > 65536 else None


def scan2d_forward(x, x_weight, dt_weight, dt_bias, A, D, *, orders, axes=(), interpret: Any = False) -> jax.Array:
    """Return y of ``scan2d``, whose arguments these are."""
    walks = _plan(x, orders)
    arrays = _prepare_2d(walks, orders, axes, x.dtype, x.astype(jnp.float32), x_weight, dt_weight, dt_bias, A, D)
    # Where something is added to y yet, it is rounded after that.
    dtype = jnp.float32 if walks.merges or walks.layers > 1 else x.dtype
    of = run(walks, {"x": _flat(x), **arrays}, rank=dt_weight.shape[1], softplus=True, dtype=dtype, interpret=interpret)
    return _merged(of["y"]).reshape(x.shape).astype(x.dtype)


def scan2d_backward(
    x, x_weight, dt_weight, dt_bias, A, D, dy, *, orders, axes=(), interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Return the gradients of the six arrays from that of y."""
    walks = _plan(x, orders)
    prepare = functools.partial(_prepare_2d, walks, orders, axes, x.dtype)
    arrays, pull = jax.vjp(prepare, x.astype(jnp.float32), x_weight, dt_weight, dt_bias, A, D)
    arrays |= {"x": _flat(x), "dy": _flat(dy)}
    of = run(walks, arrays, rank=dt_weight.shape[1], softplus=True, dtype=None, interpret=interpret)
    gradients = {name: of[f"d_{name}"].sum(0) for name in ("packed", "weights", "bias", "A", "D")}
    projected, *others = pull(gradients | {"packed": _filled(gradients["packed"], 3, arrays["packed"].shape[3])})
    return (projected + _merged(of["dx"]).reshape(x.shape)).astype(x.dtype), *others


def selective_scan_forward(
    u, delta, A, B, C, D, delta_bias, initial_state, *, delta_softplus, reverse, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Return y and the last state of a scan in the form of ``terms.py``, both float32."""
    walks = sequences(u.shape[1], u.shape[2], reverse=reverse)
    arrays = {"x": u, **_prepare_1d(delta, A, B, C, D, delta_bias, initial_state)}
    of = run(walks, arrays, rank=0, softplus=delta_softplus, dtype=jnp.float32, interpret=interpret)
    return _merged(of["y"]), of["final"][:, :, : A.shape[1]]


def selective_scan_backward(
    u, delta, A, B, C, D, delta_bias, initial_state, dy, d_final, *, delta_softplus, reverse, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Return the gradients of the eight arrays from those of y and of the last state."""
    walks = sequences(u.shape[1], u.shape[2], reverse=reverse)
    arrays, pull = jax.vjp(_prepare_1d, delta, A, B, C, D, delta_bias, initial_state)
    arrays |= {"x": u, "dy": dy, "d_final": _powers_of_two(d_final, 2)}
    of = run(walks, arrays, rank=0, softplus=delta_softplus, dtype=None, interpret=interpret)
    gradients = {name: of[f"d_{name}"].sum(0) for name in ("A", "D", "bias", "B", "C")}
    gradients |= {"delta": of["d_delta"], "start": of["d_start"]}
    return _merged(of["dx"]).astype(u.dtype), *pull({n: g.astype(arrays[n].dtype) for n, g in gradients.items()})


def _plan(x: jax.Array, orders: tuple[Order | Chain, ...]) -> Plan:
    images, height, width, channels = x.shape
    return plan(tuple(orders), height, width, apart=programs(images, channels) < ENOUGH)


def _flat(image: jax.Array) -> jax.Array:
    """Bring an image (B, H, W, E) into the form of ``run``."""
    return image.reshape(image.shape[0], -1, 1, image.shape[3])


def _merged(layers: jax.Array) -> jax.Array:
    return layers[0] if layers.shape[0] == 1 else layers.sum(0)


def _powers_of_two(x: jax.Array, axis: int = -1) -> jax.Array:
    """Fill up an axis of N states with states that stay zero."""
    return _filled(x, axis, power_of_two(x.shape[axis]))


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _prepare_1d(delta, A, B, C, D, delta_bias, initial_state) -> Arrays:
    """Return what ``run`` takes beside u."""
    return {
        "delta": delta,
        "A": _powers_of_two(A, 1) * LOG2E,
        "B": _powers_of_two(B),
        "C": _powers_of_two(C),
        "D": D,
        "bias": delta_bias,
        "start": _powers_of_two(initial_state, 2),
    }


def _prepare_2d(walks: Plan, orders, axes, dtype, x, x_weight, dt_weight, dt_bias, A, D) -> Arrays:
    """Return what ``run`` takes beside the image, which is float32 here; its values are of ``dtype``."""
    x_weight, dt_weight, dt_bias, A, D = (a.astype(jnp.float32) for a in (x_weight, dt_weight, dt_bias, A, D))
    rank, state = dt_weight.shape[1], A.shape[2]
    low, B, C = jnp.split(x_weight, [rank, rank + state], -1)
    x_weight = jnp.concatenate([_powers_of_two(B), _powers_of_two(C), low], -1)
    x_weight = _filled(x_weight, -1, -(-x_weight.shape[-1] // 4) * 4)  # so that four neighbours are one read
    return {
        "packed": sum_over(axes, _project(walks, orders, dtype, x, x_weight)),
        "weights": _filled(dt_weight, 1, max(TILE, power_of_two(rank))),
        "bias": dt_bias,
        "A": _powers_of_two(A.swapaxes(1, 2), 1) * LOG2E,
        "D": D,
    }


def _project(walks: Plan, orders, dtype, x: jax.Array, x_weight: jax.Array) -> jax.Array:
    """Return (B, H * W, slots, 2N + R): what each pixel is projected to for the orders that visit it."""
    images, height, width, channels = x.shape
    lattices = [lattice(order) for order in orders]
    if all(own == Order() for own in lattices):
        # One product; every set has a slot of its own.
        rows = _product(x.reshape(-1, channels), jnp.concatenate(list(x_weight), 1), dtype)
        return rows.reshape(images, height * width, len(orders), -1)
    parts: list[Any] = [0] * walks.slots
    for k, own in enumerate(lattices):
        pixels = own.read(x)
        rows = _product(pixels.reshape(-1, channels), x_weight[k], dtype).reshape(*pixels.shape[:2], -1)
        parts[walks.slot_of[k]] = parts[walks.slot_of[k]] + own.write(rows, height, width)
    packed = jnp.stack(parts, 3)
    return packed.reshape(images, height * width, *packed.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """Return x (M, E) @ weight (E, C) of float32, where the values of x are of ``dtype``.

    Those of bfloat16 are multiplied as such, with the upper and the lower half of the other factor: faster than in
    TF32, to more bits, and without a float32 copy of the image.
    """
    if dtype != jnp.bfloat16:
        return x @ weight
    upper, lower = jnp.split(_dot(_narrow(x, dtype), _halves(weight), 1, 0), 2, 1)
    return upper + lower


def _product_forward(x, weight, dtype):
    return _product(x, weight, dtype), (x, weight)


def _product_backward(dtype, kept, dy):
    x, weight = kept
    dx = dy @ weight.T
    if dtype != jnp.bfloat16:
        return dx, x.T @ dy
    upper, lower = jnp.split(_dot(_narrow(x, dtype), _halves(dy), 0, 0), 2, 1)
    return dx, upper + lower


_product.defvjp(_product_forward, _product_backward)


def _narrow(x: jax.Array, dtype: Any) -> jax.Array:
    # The barrier, since XLA of JAX 0.10.2 takes the reading of a sub-lattice into the product, and then cannot tile it.
    return lax.optimization_barrier(x.astype(dtype))


def _halves(x: jax.Array) -> jax.Array:
    """Return float32 columns as bfloat16 and, beside them, as bfloat16 what that leaves of them."""
    upper = lax.reduce_precision(x, 8, 7)  # XLA may leave out a conversion there and back
    return jnp.concatenate([upper, x - upper], 1).astype(jnp.bfloat16)


def _dot(x: jax.Array, y: jax.Array, axis_x: int, axis_y: int) -> jax.Array:
    return lax.dot_general(x, y, (((axis_x,), (axis_y,)), ((), ())), preferred_element_type=jnp.float32)
