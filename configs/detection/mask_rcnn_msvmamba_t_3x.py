"""Mask R-CNN over MSVMamba-Tiny, its first version, on COCO, 3x with images of several scales.

Published AP: 48.3 and of masks 43.2, with 53M parameters (the official README; arXiv:2405.14174v1). Not yet run here.
36 epochs: 263,844 steps of 16 images, 4,221,504 in all.

The official run starts from released ImageNet weights, which have no address of their own: name the file,
``--config.init_from=FILE``.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("msvmamba_t", epochs=36, init_from="")
