"""The TPU that a kernel is planned for: the shape of a register, its memory, and its row of tuned numbers."""

import dataclasses
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import tuning
from pallas_kernels.tpu.tuning import Tuning

# A vector register holds 8 sublanes of 128 lanes, 32 bits each. Channels lie on sublanes, images on lanes.
SUBLANES = 8
LANES = 128


@dataclasses.dataclass(frozen=True)
class Chip:
    """What matters of the machine that runs a kernel.

    Attributes:
        vmem: bytes of its VMEM.
        tuning: the numbers chosen for its generation.
        interpret: None for a TPU; otherwise what ``pallas_call`` takes to run a kernel without one.
    """

    vmem: int
    tuning: Tuning
    interpret: Any = None

    @property
    def room(self) -> int:
        """Bytes of VMEM for blocks and scratch: the compiler needs the rest for values that leave the registers."""
        return self.vmem - max(self.vmem // 10, min(self.vmem // 5, 3 * 2**20))


def current_chip(interpret: Any = None) -> Chip:
    """Return the chip that the program is lowered for: that of the mesh in use, or the one that is attached.

    A chip that is not described counts as one with the memory and the row that all but the oldest have. ``interpret``
    runs the kernels on a machine without a TPU.
    """
    try:
        info = pltpu.get_tpu_info()
        vmem, generation = info.vmem_capacity_bytes, info.generation
    except (ValueError, RuntimeError):
        vmem, generation = 64 * 2**20, 5
    return Chip(vmem, tuning.INTERPRETED if interpret else tuning.of_generation(generation), interpret)


def round_up(n: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-n // multiple) * multiple
