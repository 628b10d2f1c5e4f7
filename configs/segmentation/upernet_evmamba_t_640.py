"""UperNet over EfficientVMamba-T on ADE20K, 640 px.

The paper tells of such a run and has no result of it (arXiv:2403.09977). Not yet run here. 160,000 iterations of 16
images, 2,560,000 in all.

All else is as in upernet_evmamba_t, and inferred.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("evmamba_t", drop_path_rate=0.2, width=256, image_size=640, dtype="bfloat16")
