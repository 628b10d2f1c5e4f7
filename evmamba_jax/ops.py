"""The scans of ``pallas_kernels``, each device with its own part of the batch.

XLA cannot divide a kernel among devices, so under a mesh (``jax.set_mesh``) they run inside ``jax.shard_map``: the
batch lies over as many of the mesh's axes as divide it, and is whole, as parameters are, along the others. Without a
mesh, and on axes that the caller has taken in hand, these are the functions of ``pallas_kernels`` and nothing more.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

import pallas_kernels


def scan2d(x: jax.Array, *parameters: jax.Array, **options: Any) -> jax.Array:
    """Scan images (B, H, W, E) along orders of their pixels; arguments are those of :func:`pallas_kernels.scan2d`."""
    return _over_batch(functools.partial(pallas_kernels.scan2d, **options), (x,), parameters)


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    delta_bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scan sequences (batch, length, channels); arguments are those of :func:`pallas_kernels.selective_scan`."""

    def scan(u, delta, B, C, initial_state, A, D, delta_bias):
        return pallas_kernels.selective_scan(
            u, delta, A, B, C, D, delta_bias=delta_bias, initial_state=initial_state, **options
        )

    return _over_batch(scan, (u, delta, B, C, initial_state), (A, D, delta_bias))


def _over_batch(function: Callable, streams: tuple, parameters: tuple) -> Any:
    """Call ``function(*streams, *parameters)``, the first axis of streams and results over the devices of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    batch = jax.tree.leaves(streams)[0].shape[0]
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # Those of one device too: a kernel must find no axis left to XLA.
    free = [name for name, kind in kinds if kind == AxisType.Auto]
    if math.prod(mesh.shape[name] for name in free) == 1:
        return function(*streams, *parameters)
    axes: list[str] = []
    for name in free:
        if batch % math.prod([mesh.shape[axis] for axis in (*axes, name)]) == 0:
            axes.append(name)
    rows = PartitionSpec(tuple(axes) or None)
    specs = (*(rows for _ in streams), *(PartitionSpec() for _ in parameters))
    # Without check_vma, which the interpreter of kernels does not know.
    mapped = jax.shard_map(function, in_specs=specs, out_specs=rows, axis_names=set(free), check_vma=False)
    return mapped(*streams, *parameters)
