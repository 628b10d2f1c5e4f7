"""Mask R-CNN over VMamba-S (ssm_ratio 2, 15 blocks in stage 3) on COCO, 3x with images of several scales.

Published AP: 49.9 and of masks 44.2, with 70M parameters (arXiv:2401.10166). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("vmamba_s", epochs=36, drop_path_rate=0.3)
