"""``scan2d``: the selective scan over images, along any orders of their pixels."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.apart import read_once
from pallas_kernels.arguments import as_arrays, axis_sizes, check_choice, mesh_axes
from pallas_kernels.dispatch import Kernels, Operation, at_callers_line, sum_over
from pallas_kernels.orders import Chain, Order
from pallas_kernels.portable import PORTABLE
from pallas_kernels.selective_scan import IMPLEMENTATIONS, recurrence


@at_callers_line
def scan2d(
    x: jax.Array,
    x_weight: jax.Array,
    dt_weight: jax.Array,
    dt_bias: jax.Array,
    A: jax.Array,
    D: jax.Array,
    *,
    orders: tuple[Order | Chain, ...],
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scan an image along K orders, each with parameters of its own, and add up what they write to each pixel.

    The projections act on one pixel and so commute with every order: only the recurrence follows the orders, and an
    implementation is free to project before or after it reads them. Each order projects only the pixels it visits.
    Computed in float32, or in float64 if any argument is.

    Only the projections to dt, B and C look at several channels. So inside ``jax.shard_map`` each device may have a
    part of the channels, E below, of the image and of all parameters: ``axis_name`` says along which axes of the mesh
    they are divided, and the projections are summed over these. Gradients are those of the device's own part.

    Args:
        x: (B, H, W, E) image.
        x_weight: (K, E, R + 2N) what each order projects a pixel with: to dt of rank R, then B (N), then C (N).
        dt_weight: (K, R, E) weights from dt of rank R to the step size of every channel.
        dt_bias: (K, E) bias of the step size, which then goes through softplus.
        A: (K, E, N) continuous-time decay, negative.
        D: (K, E) weight of the skip from x to y.
        orders: K orders, for example ``CROSS`` or ``ATROUS``; a ``Chain`` is walked by one scan.
        axis_name: the axis or axes of the mesh over which channels are divided; None where each device has them all.
        implementation: as for ``selective_scan``.

    Returns:
        y (B, H, W, E) in the dtype of x: the sum over the orders, which for disjoint orders is a plain write.

    Raises:
        ValueError: a shape that does not fit the arguments before it, orders that are not K, an unknown implementation,
            an axis_name that is no axis of a ``jax.shard_map`` around the call.
        TypeError: an argument that is no array of floating-point numbers, an order that is neither
            Order nor Chain.

    Source: VMamba, section 4.3 (SS2D); EfficientVMamba, section 3.2 (ES2D).
    """
    name = "scan2d"
    check_choice(name, implementation, IMPLEMENTATIONS)
    given = as_arrays(name, x=x, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D, x_weight=x_weight)
    axes = {
        "x": "B H W E",
        "dt_weight": "K R E",
        "dt_bias": "K E",
        "A": "K E N",
        "D": "K E",
        "x_weight": "K E R+2N",
    }
    sizes = axis_sizes(name, given, axes)
    packed = sizes["R"] + 2 * sizes["N"]
    if sizes["R+2N"] != packed:
        raise ValueError(
            f"{name}: x_weight has a last axis of {sizes['R+2N']}, expected R + 2N = {packed} "
            f"with R={sizes['R']} of dt_weight and N={sizes['N']} of A"
        )
    orders = tuple(orders)
    for order in orders:
        if not isinstance(order, Order | Chain):
            raise TypeError(f"{name}: orders must hold Order or Chain values, got {type(order).__name__}")
    if len(orders) != sizes["K"]:
        raise ValueError(
            f"{name}: {len(orders)} orders were given, but dt_weight has K={sizes['K']} sets of parameters"
        )
    arrays = (given[part] for part in ("x", "x_weight", "dt_weight", "dt_bias", "A", "D"))
    return _scan2d(*arrays, orders=orders, axes=mesh_axes(name, axis_name), implementation=implementation)


@functools.partial(jax.jit, static_argnames=("orders", "axes", "implementation"))
def _scan2d(*arrays, orders, axes, implementation):
    if implementation in PORTABLE:
        return _planar(*arrays, orders=orders, axes=axes, run=PORTABLE[implementation])
    (y,) = _OPERATION(*arrays, orders=orders, axes=axes, implementation=implementation)
    return y


def _planar(x, x_weight, dt_weight, dt_bias, A, D, *, orders, axes, run):
    """Read the orders as groups of one scan for each length that occurs, scan, and write back."""
    wide = functools.reduce(jnp.promote_types, (a.dtype for a in (x, x_weight, dt_weight, dt_bias, A, D)), jnp.float32)
    height, width = x.shape[1:3]
    rank, state = dt_weight.shape[1], A.shape[2]
    by_length: dict[int, list[int]] = {}
    for k, order in enumerate(orders):
        by_length.setdefault(order.length(height, width), []).append(k)

    total = jnp.zeros_like(x, dtype=wide)
    for ks in by_length.values():
        reads = read_once(functools.partial(_read, orders=tuple(orders[k] for k in ks)), x)
        u = jnp.stack(reads, 2)
        own = functools.partial(_rows, ks=ks, dtype=wide)
        # One product for each order: a CPU would transpose both maps for a product with an axis of orders.
        weighted = [_project(read.astype(wide), x_weight[k].astype(wide)) for read, k in zip(reads, ks, strict=True)]
        projected = sum_over(axes, jnp.stack(weighted, 2))
        dt, B, C = jnp.split(projected, [rank, rank + state], -1)
        # Highest: an accelerator would else round both factors to bfloat16, and the recurrence compounds the error.
        exact = functools.partial(_project, precision=lax.Precision.HIGHEST)
        delta = jnp.stack([exact(dt[:, :, i], dt_weight[k].astype(wide)) for i, k in enumerate(ks)], 2)
        # Made from u, not anew, so that it is sharded as u is.
        rest = jnp.zeros_like(u[:, 0, :, None], dtype=wide)
        start = jnp.broadcast_to(rest, (u.shape[0], len(ks), state, u.shape[3]))
        arrays = (u, delta, own(A).swapaxes(1, 2), B, C, own(D), own(dt_bias), start)
        y, _ = recurrence(*arrays, run=run, delta_softplus=True, reverse=False)
        for i, k in enumerate(ks):
            total = total + orders[k].write(y[:, :, i], height, width)
    return total.astype(x.dtype)


def _read(x, orders):
    """Return what each of the orders reads of an image, (B, L, E) each."""
    return tuple(order.read(x) for order in orders)


def _project(x, weight, precision=None):
    """Return x (B, L, I) times weight (I, O) as a product of two matrices, whose gradients are such products too."""
    return jnp.matmul(x.reshape(-1, x.shape[-1]), weight, precision=precision).reshape(*x.shape[:-1], -1)


def _rows(parameters, ks, dtype):
    """Return the parameters of the orders ks, by static slices."""
    return jnp.stack([parameters[k] for k in ks]).astype(dtype)


def _portable(*arrays, **options):
    return (_planar(*arrays, run=PORTABLE["sequential"], **options),)


def _tpu() -> Kernels:
    from pallas_kernels.tpu.images import SCAN2D

    return SCAN2D


def _gpu() -> Kernels:
    from pallas_kernels.gpu.images import SCAN2D

    return SCAN2D


KERNELS = {"tpu": _tpu, "cuda": _gpu}

_OPERATION = Operation(
    name="scan2d",
    arity=6,
    portable=_portable,
    results=lambda x, *_: (x,),
    kernels=KERNELS,
)
