"""Mask R-CNN over VMamba-T (ssm_ratio 1, 8 blocks in stage 3) on COCO, 3x with images of several scales.

Published AP: 48.8 and of masks 43.7, with 50M parameters (arXiv:2401.10166). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("vmamba_t", epochs=36)
