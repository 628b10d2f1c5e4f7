"""The scans as TPU kernels (Mosaic): what ``scan_1d.py`` and ``scan_2d.py`` call on a TPU.

Both functions become one: orders over an image with parameter sets. A sequence is an image of one column, or folded
into several, and its groups are sub-lattices. What is not the recurrence stays in XLA: the transposition that brings
images to the minor axis (free where XLA keeps activations so itself), the projection to time step, B and C, and copies
of the parameters for every lane. The gradient of all that is JAX's own; the kernels have gradients written by hand.
"""

from pallas_kernels.tpu.images import scan2d_backward, scan2d_forward, scan2d_unsupported
from pallas_kernels.tpu.sequences import selective_scan_backward, selective_scan_forward, selective_scan_unsupported

__all__ = [
    "scan2d_backward",
    "scan2d_forward",
    "scan2d_unsupported",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_scan_unsupported",
]
