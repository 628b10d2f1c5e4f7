"""Mask R-CNN over MSVMamba-Tiny, its first version, on COCO, 1x.

Published AP: 46.9 and of masks 42.2, with 53M parameters (the official README; arXiv:2405.14174v1). Not yet run here.
12 epochs: 87,948 steps of 16 images, 1,407,168 in all.

The official run starts from released ImageNet weights, which have no address of their own: name the file,
``--config.init_from=FILE``.
"""

from evmamba_jax.recipes.detection import mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return mask_rcnn("msvmamba_t", init_from="")
