"""RetinaNet over MSVMamba-Tiny, its first version, on COCO, 1x: ours.

No published AP. Not yet run here. 12 epochs: 87,948 steps of 16 images, 1,407,168 in all.

Nothing is published of this detector: drop path and precision are those of the official Mask R-CNN over the same
backbone, the rest is the recipe for EfficientVMamba's.

Start it from the released ImageNet weights, which have no address of their own: name the file,
``--config.init_from=FILE``.
"""

from evmamba_jax.recipes.retinanet import recipe
from evmamba_jax.tasks.detection import DetectionConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return recipe("msvmamba_t", init_from="")
