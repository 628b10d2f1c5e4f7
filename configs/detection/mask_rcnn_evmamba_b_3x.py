"""Mask R-CNN over EfficientVMamba-B on COCO, 3x with images of several scales.

Published AP: 45.0 and of masks 40.8, with 53M parameters (arXiv:2403.09977). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.

Mixed precision is bfloat16 here, float16 there.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("evmamba_b", epochs=36, dtype="bfloat16")
