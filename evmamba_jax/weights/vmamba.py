"""Official names of VMamba's parameters.

Source: the ``state_dict`` of ``VSSM`` in MzeroMiko/VMamba, ``classification/models/vmamba.py`` at 2ed52ea.
"""

from flax import nnx

from evmamba_jax.layers.s6 import S6
from evmamba_jax.models.vmamba import VMamba
from evmamba_jax.weights.layers import MLP, Row, below, layer_norm, ss2d, staged


def block(sets: int) -> list[Row]:
    """Return the rows of a block with this many sets of scan parameters, 4 in the official code."""
    return [
        *layer_norm("norm", "norm"),
        *below("mixer", "op", ss2d(sets)),
        *layer_norm("norm2", "norm2"),
        *below("mlp", "mlp", MLP),
    ]


# Beginnings of names in older files, and what they became; the official loader changes them in the same way.
OLD_NAMES = {
    r"^patch_embed\.proj\b": "patch_embed.0",
    r"^patch_embed\.norm\b": "patch_embed.2",
    r"^(layers\.\d+\.blocks\.\d+)\.ln_1\b": r"\1.norm",
    r"^(layers\.\d+\.blocks\.\d+)\.self_attention\b": r"\1.op",
    r"^norm\b": "classifier.norm",
    r"^head\b": "classifier.head",
}


def table(model: VMamba) -> list[Row]:
    """Return the rows of a whole model."""
    scans = (part for _, part in nnx.iter_modules(model) if isinstance(part, S6))
    return staged(model, block(next((scan.D.shape[0] for scan in scans), 4)))
