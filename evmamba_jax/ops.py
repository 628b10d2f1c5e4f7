"""The scans of ``pallas_kernels``, and convolutions over whole sequences, each device with its own part of the arrays.

XLA cannot divide a kernel among devices, and sends all of a Fourier transform to each, so under a mesh
(``jax.set_mesh``) they run inside ``jax.shard_map``. An axis of the mesh divides the batch if it can; else the
channels, if every device is left eight or more, in whole groups where there are several; else all devices along it do
the same. Without a mesh, and on axes that the caller has taken in hand, the scans are the functions of
``pallas_kernels`` and nothing more.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

import pallas_kernels
from pallas_kernels.dispatch import at_callers_line

# At least so many channels stay on a device: kernels fill them up to a multiple of 8, so that fewer would cost as much.
FEWEST = 8

LONGEST_PRODUCT = 256  # tokens of a sequence that is convolved by a product

# Which axis of an array is the batch, the channels, or the groups of channels that share B and C.
_IMAGE = PartitionSpec("batch", None, None, "channels")
_PARAMETER = PartitionSpec(None, "channels")
_SEQUENCE = PartitionSpec("batch", None, "channels")
_GROUPS = PartitionSpec("batch", None, "groups")
_STATE = PartitionSpec("batch", "channels")
_CHANNELS = PartitionSpec("channels")


@at_callers_line
def scan2d(x: jax.Array, *parameters: jax.Array, **options: Any) -> jax.Array:
    """Scan images (B, H, W, E) along orders of their pixels.

    Takes the arguments of :func:`pallas_kernels.scan2d` without ``axis_name``, which follows from the mesh.
    """

    def scan(axes, *arrays):
        return pallas_kernels.scan2d(*arrays, axis_name=axes, **options)

    places = (_IMAGE, _PARAMETER, PartitionSpec(None, None, "channels"), _PARAMETER, _PARAMETER, _PARAMETER)
    return _over_devices(scan, (x, *parameters), places, _IMAGE)


@at_callers_line
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
    return_final_state: bool = False,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scan sequences (batch, length, channels); takes the arguments of :func:`pallas_kernels.selective_scan`."""

    def scan(_, u, delta, A, B, C, D, delta_bias, initial_state):
        more = {"delta_bias": delta_bias, "initial_state": initial_state, "return_final_state": return_final_state}
        return pallas_kernels.selective_scan(u, delta, A, B, C, D, **more, **options)

    arrays = (u, delta, A, B, C, D, delta_bias, initial_state)
    places = (_SEQUENCE, _SEQUENCE, _CHANNELS, _GROUPS, _GROUPS, _CHANNELS, _CHANNELS, _STATE)
    return _over_devices(scan, arrays, places, (_SEQUENCE, _STATE) if return_final_state else _SEQUENCE)


def convolve(u: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve sequences (batch, length, channels), each channel with a kernel over the whole sequence.

    Args:
        u: of type float32 or float64.
        kernel: (channels, 2 * length) by lag, modulo twice the length: the token ``l`` places before counts with
            ``kernel[:, l]``, that ``l`` places after with ``kernel[:, 2 * length - l]``.

    Returns:
        (batch, length, channels). By Fourier transforms; on a TPU, up to 256 tokens by a product with the kernel's
        Toeplitz matrix, as its matrix unit has nothing else to do. (On a CPU that takes up to eighty times as long.)
    """
    by_platform = {"tpu": _by_toeplitz} if u.shape[1] <= LONGEST_PRODUCT else {}

    def by(_, *arrays):
        return jax.lax.platform_dependent(*arrays, **by_platform, default=_by_fourier)

    return _over_devices(by, (u, kernel), (_SEQUENCE, PartitionSpec("channels", None)), _SEQUENCE)


@jax.checkpoint  # the matrix is made again, not kept
def _by_toeplitz(u: jax.Array, kernel: jax.Array) -> jax.Array:
    channels, twice = kernel.shape
    length = twice // 2
    # Row after row of a matrix one column narrower than what is repeated in it, so that each begins one lag earlier.
    repeated = jnp.broadcast_to(kernel[:, None], (channels, length, twice)).reshape(channels, -1)
    rows = repeated[:, : length * (twice - 1)].reshape(channels, length, twice - 1)
    return jnp.einsum("bje,eji->bie", u, rows[:, :, :length])


def _by_fourier(u: jax.Array, kernel: jax.Array) -> jax.Array:
    length = u.shape[1]
    product = jnp.fft.rfft(u, 2 * length, axis=1) * jnp.fft.rfft(kernel, axis=1).T
    return jnp.fft.irfft(product, 2 * length, axis=1)[:, :length]


def _over_devices(function: Callable, arrays: tuple, places: tuple[PartitionSpec, ...], results: Any) -> Any:
    """Call ``function(axes, *arrays)``, every device with its part of the arrays.

    Args:
        function: takes first the axes of the mesh over which its channels are divided.
        arrays: as the caller of this module has them; None stays None.
        places: what the axes of each array are.
        results: what the axes of each result are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # Axes of one device count too: a kernel must find no axis left to XLA.
    free = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
    if math.prod(free.values()) == 1:
        return function((), *arrays)
    sizes = {"groups": 1}
    for array, place in zip(arrays, places, strict=True):
        # A shape that does not fit is for the function to complain about.
        sizes |= {} if array is None else dict(zip(place, array.shape, strict=False))
    over = _divided(sizes, free)

    def lies(place):
        return PartitionSpec(*(over.get(name) for name in place))

    mapped = jax.shard_map(
        lambda *parts: function(over["channels"], *parts),
        in_specs=tuple(map(lies, places)),
        out_specs=jax.tree.map(lies, results),
        axis_names=set(free),
        check_vma=False,  # which the interpreter of kernels does not know
    )
    return mapped(*arrays)


def _divided(sizes: dict[str, int], free: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the axes of the mesh over which batch, channels and groups of these sizes lie."""
    over: dict[str, tuple[str, ...]] = {"batch": (), "channels": (), "groups": ()}
    left = dict(sizes)  # on one device
    for axis, devices in free.items():
        # Channels that share B and C stay together; of a single group, all devices have B and C.
        channels = ("channels", "groups") if left["groups"] > 1 else ("channels",)
        if left["batch"] % devices == 0:
            divided = ("batch",)
        elif left["channels"] >= FEWEST * devices and all(left[name] % devices == 0 for name in channels):
            divided = channels
        else:
            divided = ()
        for name in divided:
            over[name] += (axis,)
            left[name] //= devices
    return over
