"""Mask R-CNN over Vanilla VMamba-B on COCO, 1x.

Published AP: 48.6 and of masks 43.3, with 96M parameters (arXiv:2401.10166). Not yet run here. 12 epochs: 87,948 steps
of 16 images, 1,407,168 in all.

The official file names no drop path, so that Swin's 0.2 holds for all three sizes.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("vmamba_b_v0")
