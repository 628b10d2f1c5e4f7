"""Mask R-CNN over Vanilla VMamba-S on COCO, 3x with images of several scales.

Published AP: 49.7 and of masks 44.0, with 64M parameters (arXiv:2401.10166). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.

The official file names no drop path, so that Swin's 0.2 holds for all three sizes.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("vmamba_s_v0", epochs=36)
