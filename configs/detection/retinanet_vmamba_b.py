"""RetinaNet over VMamba-B (ssm_ratio 2, 15 blocks in stage 3) on COCO, 1x: ours.

No published AP. Not yet run here. 12 epochs: 87,948 steps of 16 images, 1,407,168 in all.

Nobody has published this detector. Drop path and precision come from the official Mask R-CNN over the same backbone.
The rest is the recipe for EfficientVMamba's.
"""

from evmamba_jax.recipes.detection import retinanet
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return retinanet("vmamba_b", drop_path_rate=0.6)
