"""A small EfficientVMamba with RetinaNet on scenes of digits: a box around each of ten digits.

4.5 epochs: 4,500 steps of 4 images, 18,000 in all.

The first boxes of a newcomer: it needs no download. The scenes are made as they are read, 128x128 pixels, 3 to 8
digits that hide up to 30 % of one another; 4,000 to train, 200 of other digits to test.

As ``:mask_rcnn`` it is Mask R-CNN, which also finds the mask of each digit: 3 epochs: 3,000 steps of 4 images, 12,000
in all.
"""

from evmamba_jax.recipes.digit_scenes import detection
from evmamba_jax.tasks.detection import DetectionConfig


def get_config(detector: str = "retinanet") -> DetectionConfig:
    """Return the configuration of a detector: retinanet or mask_rcnn."""
    return detection(detector)
