"""UperNet over Vim-S on ADE20K, 512 px.

Published mIoU: 44.9, with 46M parameters (arXiv:2401.09417v3). Not yet run here. 60,000 iterations of 32 images,
1,920,000 in all.

The official backbone also turns its sequence and residual stream by rotary embeddings, which the released classifier
does not have. Here there are none.
"""

from evmamba_jax.recipes.upernet import vim
from evmamba_jax.tasks.segmentation import SegmentationConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return vim("vim_s", width=384, lr=1e-4, weight_decay=0.05, layer_decay=0.95)
