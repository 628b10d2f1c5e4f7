"""Mask R-CNN over VMamba-T (ssm_ratio 2, 5 blocks in stage 3) on COCO, 3x with images of several scales.

Published AP: 48.9 and of masks 43.7 (the official README). Not yet run here. 36 epochs: 263,844 steps of 16 images,
4,221,504 in all.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("vmamba_t_s2l5", epochs=36)
