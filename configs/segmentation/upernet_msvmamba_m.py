"""UperNet over MSVMamba-Micro on ADE20K, 512 px.

Published mIoU: 45.1, and 45.4 at several scales, with 42M parameters (arXiv:2405.14174). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.

The official run starts from released ImageNet weights, which have no address of their own: name the file,
``--config.init_from=FILE``.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("msvmamba_m", drop_path_rate=0.3, init_from="")
