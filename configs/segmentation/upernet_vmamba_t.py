"""UperNet over VMamba-T (ssm_ratio 1, 8 blocks in stage 3) on ADE20K, 512 px.

Published mIoU: 48.0, and 48.8 at several scales, with 62M parameters (arXiv:2401.10166). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("vmamba_t", drop_path_rate=0.2)
