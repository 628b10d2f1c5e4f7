"""UperNet over EfficientVMamba-B on ADE20K, 512 px.

Published mIoU: 46.5, and 47.3 at several scales, with 65M parameters (arXiv:2403.09977). Not yet run here. 160,000
iterations of 16 images, 2,560,000 in all.

Neither this segmenter's files nor its settings were released. A head of 512 channels is inferred from the published
size; optimizer, schedule and crops are those of VMamba's segmenters, drop path 0.2 and mixed precision those of
EfficientVMamba's own detectors.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("evmamba_b", drop_path_rate=0.2, dtype="bfloat16")
