"""UperNet over Vim-Ti on ADE20K, 512 px.

Published mIoU: 41.0, with 13M parameters (arXiv:2401.09417v3). Not yet run here. 60,000 iterations of 32 images,
1,920,000 in all.

The official heads read the hidden states of four blocks without the residual; here they read the residual stream, as
those of Vim-S do.
"""

from evmamba_jax.recipes.upernet import vim
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return vim("vim_t", width=192, lr=2e-4, weight_decay=0.1, layer_decay=0.92)
