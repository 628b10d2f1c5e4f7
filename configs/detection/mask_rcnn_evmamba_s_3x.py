"""Mask R-CNN over EfficientVMamba-S on COCO, 3x with images of several scales.

Published AP: 41.6 and of masks 38.2, with 31M parameters (arXiv:2403.09977). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.

The released file names 96 channels and so another backbone; these heads over 64 have the published size. Mixed
precision is bfloat16 here, float16 there. No file of this schedule was released: the settings are from the 1x and
the other backbones' 3x.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("evmamba_s", epochs=36, dtype="bfloat16")
