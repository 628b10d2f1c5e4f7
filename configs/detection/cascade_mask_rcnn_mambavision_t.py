"""Cascade Mask R-CNN over MambaVision-T on COCO, 3x with images of several scales.

Published AP: 51.1 and of masks 44.3, with 86M parameters (arXiv:2407.08083). Not yet run here. 36 epochs: 263,844 steps
of 16 images, 4,221,504 in all.

The released file's own head has 89.2M parameters; 86M is what Swin-T has under the same heads. The official file's drop
path has no effect: its backbone keeps 0.2. Mixed precision is bfloat16 here, float16 there.
"""

from evmamba_jax.recipes.detection import cascade_mask_rcnn
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return cascade_mask_rcnn("mambavision_t")
