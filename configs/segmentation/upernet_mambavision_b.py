"""UperNet over MambaVision-B on ADE20K, 512 px.

Published mIoU: 49.1, with 126M parameters (arXiv:2407.08083). Not yet run here. 160,000 iterations of 16 images,
2,560,000 in all.

The official file's drop path of 0.4 has no effect: its backbone keeps 0.2. Mixed precision is bfloat16 here, float16
there.
"""

from evmamba_jax.recipes.upernet import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return recipe("mambavision_b", drop_path_rate=0.2, lr=5e-5, dtype="bfloat16", eval_steps=10_000)
