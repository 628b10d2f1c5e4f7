"""UperNet over EfficientVMamba-T on ADE20K, 512 px.

Published mIoU: 38.9, and 39.3 at several scales, with 14M parameters (arXiv:2403.09977). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.

Neither this segmenter's files nor its settings were released. A head of 256 channels is inferred from the published
size; optimizer, schedule and crops are those of VMamba's segmenters, drop path 0.2 and mixed precision those of
EfficientVMamba's own detectors.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("evmamba_t", drop_path_rate=0.2, width=256, dtype="bfloat16")
