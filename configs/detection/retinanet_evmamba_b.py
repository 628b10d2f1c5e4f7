"""RetinaNet over EfficientVMamba-B on COCO, 1x.

Published AP: 42.8, with 44.0M parameters (arXiv:2403.09977, table 3). Not yet run here. 12 epochs: 87,948 steps of 16
images, 1,407,168 in all.

Neither this detector's files nor its settings were released. Pyramid and head of 256 channels are inferred from the
published size. Drop path 0.2 and mixed precision come from EfficientVMamba's own Mask R-CNN.
"""

from evmamba_jax.recipes.detection import retinanet
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return retinanet("evmamba_b", dtype="bfloat16")
