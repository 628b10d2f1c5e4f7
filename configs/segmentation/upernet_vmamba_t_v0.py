"""UperNet over Vanilla VMamba-T on ADE20K, 512 px.

Published mIoU: 47.3, and 48.3 at several scales, with 55M parameters (arXiv:2401.10166). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.

The official file names no drop path, so that Swin's 0.3 holds for all three sizes.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("vmamba_t_v0", drop_path_rate=0.3)
