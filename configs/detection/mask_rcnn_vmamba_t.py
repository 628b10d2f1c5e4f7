"""Mask R-CNN over VMamba-T (ssm_ratio 1, 8 blocks in stage 3) on COCO, 1x.

Published AP: 47.3 and of masks 42.7, with 50M parameters (arXiv:2401.10166). Not yet run here. 12 epochs: 87,948 steps
of 16 images, 1,407,168 in all.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("vmamba_t")
