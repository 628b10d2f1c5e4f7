"""EfficientVMamba-B on ImageNet-1K, 224 px.

Published top-1: 81.8 (arXiv:2403.09977, table 2; the released log says 81.72 raw, 81.79 averaged). Not yet run here.
300 epochs: 375,300 steps of 1,024 images, 384,307,200 in all.

The recipe is the one the released log shows. Variants of the same file: ``:paper`` and ``:readme``, the recipes of the
paper's text and of the official README's command, which differ (see evmamba_jax/recipes/efficientvmamba.py).
"""

from evmamba_jax.recipes.efficientvmamba import recipe


def get_config(variant: str = "released"):
    """Return the configuration of a variant: released, paper or readme."""
    return recipe("evmamba_b", batch_size=1024, variant=variant)
