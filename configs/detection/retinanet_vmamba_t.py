"""RetinaNet over VMamba-T (ssm_ratio 1, 8 blocks in stage 3) on COCO, 1x: ours.

No published AP. Not yet run here. 12 epochs: 87,948 steps of 16 images, 1,407,168 in all.

Nothing is published of this detector: drop path and precision are those of the official Mask R-CNN over the same
backbone, the rest is the recipe for EfficientVMamba's.
"""

from evmamba_jax.recipes.retinanet import recipe
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return recipe("vmamba_t")
