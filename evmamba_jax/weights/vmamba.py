"""Official names of VMamba's parameters.

Source: the ``state_dict`` of ``VSSM`` in MzeroMiko/VMamba, ``classification/models/vmamba.py`` at 2ed52ea.
"""

from evmamba_jax.models.vmamba import VMamba
from evmamba_jax.weights.layers import MLP, Row, below, layer_norm, pyramid, ss2d

BLOCK = [
    *layer_norm("norm", "norm"),
    *below("mixer", "op", ss2d(sets=4)),
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
    return pyramid(model, BLOCK)
