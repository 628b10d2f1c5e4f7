"""EfficientVMamba-T on ImageNet-1K, 224 px.

Published top-1: 76.5 (arXiv:2403.09977, table 2; the released log ends at 76.48 raw). Not yet run here. 300 epochs:
187,500 steps of 2,048 images, 384,000,000 in all; as ``:paper`` and ``:readme`` 375,300 steps of 1,024. The official
run took about 5 minutes an epoch, 25 hours, on 16 GPUs of a kind that its log does not name. On a v5e-16 the
preflight's estimate was 43 to 47 ms a step, 2.2 to 2.4 hours in all, when GELU in bfloat16 took
longer; docs/preflight.md says how far to trust it.

The recipe is the one the released log shows. Variants of the same file: ``:paper`` and ``:readme``, the recipes of the
paper's text and of the official README's command, which differ (see evmamba_jax/recipes/efficientvmamba.py).
"""

from evmamba_jax.recipes.efficientvmamba import recipe


def get_config(variant: str = "released"):
    """Return the configuration of a variant: released, paper or readme."""
    return recipe("evmamba_t", batch_size=2048, variant=variant)
