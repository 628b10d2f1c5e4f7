"""UperNet over MSVMamba-Tiny, its first version, on ADE20K, 512 px.

Published mIoU: 47.8, with 65M parameters (the official README; arXiv:2405.14174v1 has 47.6). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.

The official run starts from released ImageNet weights, which have no address of their own: name the file,
``--config.init_from=FILE``.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("msvmamba_t", drop_path_rate=0.2, init_from="")
