"""UperNet over MambaVision-L3-512-21K on ADE20K, 640 px.

Published mIoU: 53.2, with 780M parameters (the official README). Not yet run here. 160,000 iterations of 16 images,
2,560,000 in all.

The official file's drop path of 0.8 has no effect: its backbone keeps 0.2. Nor is it of mixed precision, of which its
authors say that it can be unstable.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("mambavision_l3_512", drop_path_rate=0.2, image_size=640, lr=8e-5, weight_decay=0.05, eval_steps=5000)
