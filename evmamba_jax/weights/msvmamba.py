"""Official names of MSVMamba's parameters, the same in both versions.

Source: the ``state_dict`` of ``VSSM`` in YuHengsss/MSVMamba, ``classification/models/vmamba.py``, branches master at
c394019 and v2 at fca4a39. Of the two stacked sets of scan parameters the first is the half resolution's in version 1
and the full resolution's in version 2; they stay in their places here, and the model picks.
"""

from evmamba_jax.models.msvmamba import MSVMamba
from evmamba_jax.weights.layers import CONV, LINEAR, POINTWISE, Row, below, kernel, layer_norm, ss2d, staged

SQUEEZE_EXCITE = [*kernel("reduce", "fc.0", LINEAR), *kernel("expand", "fc.2", LINEAR)]

MS2D = [*ss2d(sets=2), *kernel("conv2d_low", "conv2d_b1", CONV), *below("se", "se", SQUEEZE_EXCITE)]

CONV_FFN = [
    *kernel("pw1", "linear1", POINTWISE),
    *kernel("dw", "dwc", CONV),
    *kernel("pw2", "linear2", POINTWISE),
]

BLOCK = [
    *layer_norm("norm", "norm"),
    *below("mixer", "op", MS2D),
    *layer_norm("norm2", "norm2"),
    *below("mlp", "convFFN", CONV_FFN),
]


def table(model: MSVMamba) -> list[Row]:
    """Return the rows of a whole model."""
    return staged(model, BLOCK)
