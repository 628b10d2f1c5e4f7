"""UperNet over VMamba-S (ssm_ratio 2, 15 blocks in stage 3) on ADE20K, 512 px.

Published mIoU: 50.6, and 51.2 at several scales, with 82M parameters (arXiv:2401.10166). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("vmamba_s", drop_path_rate=0.3)
