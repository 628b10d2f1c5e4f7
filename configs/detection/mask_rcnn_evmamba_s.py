"""Mask R-CNN over EfficientVMamba-S on COCO, 1x.

Published AP: 39.3 and of masks 36.7, with 31M parameters (arXiv:2403.09977). Not yet run here. 12 epochs: 87,948 steps
of 16 images, 1,407,168 in all.

The released file names 96 channels and so another backbone; these heads over 64 have the published size. Mixed
precision is bfloat16 here, float16 there.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("evmamba_s", dtype="bfloat16")
