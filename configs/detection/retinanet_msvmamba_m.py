"""RetinaNet over MSVMamba-Micro on COCO, 1x: ours.

No published AP. Not yet run here. 12 epochs: 87,948 steps of 16 images, 1,407,168 in all.

Nobody has published this detector. Drop path and precision come from the official Mask R-CNN over the same backbone.
The rest is the recipe for EfficientVMamba's.

Start it from the released ImageNet weights, which have no address of their own: name the file,
``--config.init_from=FILE``.
"""

from evmamba_jax.recipes.detection import retinanet
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return retinanet("msvmamba_m", init_from="")
