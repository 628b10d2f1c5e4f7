"""Mask R-CNN over EfficientVMamba-B on COCO, 1x.

Published AP: 43.7 and of masks 40.2, with 53M parameters (arXiv:2403.09977). Not yet run here. 12 epochs: 87,948 steps
of 16 images, 1,407,168 in all.

Mixed precision is bfloat16 here, float16 there. No file of this schedule was released: the settings are from the 3x
and the other backbones' 1x.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("evmamba_b", dtype="bfloat16")
