"""Vim's detector, Cascade Mask R-CNN over Vim-S, on COCO with large-scale jitter.

The official file has no published result. Not yet run here. 184,375 iterations of 64 images, 11,800,000 in all.

Mixed precision is bfloat16 here, float16 there.
"""

from evmamba_jax.recipes.detection import vim_cascade
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return vim_cascade("vim_s")
