"""The scans as GPU kernels: what ``selective_scan`` and ``scan2d`` call on an NVIDIA GPU.

Why Triton, through Pallas. Of the two ways from Pallas to a GPU, Mosaic GPU is for Hopper and newer only; on an A100
there is Triton, or CUDA, with a compiler and a binary for every release of CUDA and Python. Pallas for Triton is
deprecated since JAX 0.11, but JAX 0.12 has it, and it compiles the scans for the A100, H100 and H200 alike
(``benchmarks/results/gpu_compile.md`` lists the registers). And the scan needs nothing that only Mosaic GPU has: it
multiplies no large matrices, and a program is one warp, which waits for no other. All that depends on
Pallas for Triton is in ``triton.py``, so that another way can be taken when this one ends;
``benchmarks/results/gpu_mosaic.md`` has a trial of it, compiled, and the decision of December 2026.

From the call to the chip: ``images.py`` and ``sequences.py`` bring a call into the kernels' form (``split_matmul.py``:
the projection's products), ``walks.py`` lays out the orders, ``program.py`` says what a program does, ``arrays.py``
lists all arrays, and ``call.py`` runs a kernel. ``forward.py`` and ``backward.py`` are the kernels, ``tokens.py`` what
they share.

What is not the recurrence stays in XLA: the projection to step size, B and C, once for each pixel that an order visits,
its sum over devices that share the channels, and sums of what several programs find for one array, over images or
blocks of channels. The gradient of the projection is JAX's own, but for its products; the kernels have gradients
written by hand, and keep nothing from the forward pass but its inputs.
Under ``jax.shard_map``, all arguments must vary over the same axes; ``dispatch.vary_alike`` marks them.
"""

from pallas_kernels.gpu.images import SCAN2D
from pallas_kernels.gpu.sequences import SELECTIVE_SCAN

__all__ = ["SCAN2D", "SELECTIVE_SCAN"]
