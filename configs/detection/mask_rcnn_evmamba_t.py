"""Mask R-CNN over EfficientVMamba-T on COCO, 1x.

Published AP: 35.6 and of masks 33.2, with 11M parameters (arXiv:2403.09977). Not yet run here. 12 epochs: 87,948 steps
of 16 images, 1,407,168 in all.

The released file names other widths than its backbone has and does not run. Pyramid, proposals and masks of 128
channels and fully connected layers of 512 are inferred from the published size. Mixed precision is bfloat16 here,
float16 there.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("evmamba_t", width=128, fc_width=512, dtype="bfloat16")
