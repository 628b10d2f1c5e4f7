"""The scans as TPU kernels (Mosaic): what ``selective_scan`` and ``scan2d`` call on a TPU.

Both functions become one: orders over an image with parameter sets. A sequence is an image of one column, or folded
into several, and its groups are sub-lattices. What is not the recurrence stays in XLA: the transposition that brings
images to the minor axis (free where XLA keeps activations so itself), the projection to time step, B and C, and copies
of the parameters for every lane. The gradient of all that is JAX's own; the kernels have gradients written by hand.

From the call to the chip: ``images.py`` and ``sequences.py`` bring a call into the kernels' form (``lanes.py``: how a
batch fills the lanes). ``geometry.py`` sorts the orders. ``plan.py`` chooses blocks (``blocks.py``) that fit the chip
(``chip.py``, ``tuning.py``; ``arrays.py`` lists all arrays). ``problem.py`` makes the calls one after another and
``call.py`` one of them. ``forward.py`` and ``backward.py`` are the kernels, ``tokens.py`` what they share.
"""

from pallas_kernels.tpu.images import SCAN2D
from pallas_kernels.tpu.sequences import SELECTIVE_SCAN

__all__ = ["SCAN2D", "SELECTIVE_SCAN"]
