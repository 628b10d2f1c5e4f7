"""The device mesh, and where parameters and batches lie on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax.config import Config, DistributedConfig
from evmamba_jax.errors import UserError


def join_processes(config: DistributedConfig) -> None:
    """Connect this process with the others of the run, before any device is used.

    Raises:
        UserError: the others cannot be found or reached.
    """
    if not config.enabled:
        return
    try:
        jax.distributed.initialize(
            config.coordinator_address or None,
            config.num_processes or None,
            config.process_id if config.process_id >= 0 else None,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"config.distributed.enabled, but the processes cannot be joined ({str(error).splitlines()[0]}); set "
            "config.distributed.coordinator_address, num_processes and process_id"
        ) from error


def make_mesh(config: Config, described: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the (``data``, ``fsdp``) mesh over all devices of all processes.

    Args:
        config: reads mesh, batch_size and accumulation.
        described: devices of a topology to compile for, in place of this run's.

    Raises:
        UserError: the axes do not multiply to the number of devices, or the batch does not divide by them.
    """
    devices = np.array(jax.devices() if described is None else described)
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if data == -1 and fsdp > 0 and len(devices) % fsdp == 0:
        data = len(devices) // fsdp
    if data * fsdp != len(devices) or min(data, fsdp) < 1:
        raise UserError(
            f"config.mesh is data={config.mesh.data}, fsdp={fsdp}; their product must be the {len(devices)} devices "
            "there are (data=-1 takes what fsdp leaves)"
        )
    if config.batch_size % (len(devices) * config.accumulation):
        raise UserError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of devices x accumulation = "
            f"{len(devices)} x {config.accumulation} = {len(devices) * config.accumulation}"
        )
    return Mesh(devices.reshape(data, fsdp), ("data", "fsdp"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return a sharding for every array of ``state``: its largest axis that ``fsdp`` divides lies over ``fsdp``.

    Parameters, moments and moving averages have the same shapes, so they lie alike.
    """
    fsdp = mesh.shape["fsdp"]

    def one(array: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(array.shape) if size % fsdp == 0]
        # Splitting a vector of a few hundred numbers costs more in messages than it saves in memory.
        if fsdp == 1 or not divisible or math.prod(array.shape) < 2**12:
            return replicated(mesh)
        spec: list[str | None] = [None] * len(array.shape)
        spec[max(divisible, key=lambda axis: array.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, state)


def is_main() -> bool:
    """Return whether this process is the one that writes and tells."""
    return jax.process_index() == 0
