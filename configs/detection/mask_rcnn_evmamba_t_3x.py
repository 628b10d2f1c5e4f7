"""Mask R-CNN over EfficientVMamba-T on COCO, 3x with images of several scales.

Published AP: 38.3 and of masks 35.3, with 11M parameters (arXiv:2403.09977). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.

The released file names other widths than its backbone has and does not run. Pyramid, proposals and masks of 128
channels and fully connected layers of 512 are inferred from the published size. Mixed precision is bfloat16 here,
float16 there. No file of this schedule was released: the settings are from the 1x and the other backbones' 3x.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("evmamba_t", epochs=36, width=128, fc_width=512, dtype="bfloat16")
