"""Vim's detector, Cascade Mask R-CNN over Vim-Ti, on COCO with large-scale jitter.

Published AP: 45.7 and of masks 39.2 (arXiv:2401.09417v3). Not yet run here. 184,375 iterations of 64 images, 11,800,000
in all.

The settings are those of the released run, whose rate falls by 0.837 a layer; the paper speaks of 380,000 iterations.
Mixed precision is bfloat16 here, float16 there.
"""

from evmamba_jax.recipes.detection import vim_cascade
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return vim_cascade("vim_t")
