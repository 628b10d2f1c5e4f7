"""MambaVision-L3-512-21K on ImageNet-1K, 512 px.

Published top-1: 88.1 (the official README). Not yet run here.
320 epochs: 99,840 steps of 4,096 images, 408,944,640 in all.

Published after pre-training on ImageNet-21K, which is not this run; neither that recipe nor the fine-tuning one was
released, so this is L2's with the model's own drop path.
"""

from evmamba_jax.recipes.mambavision import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe(
        "mambavision_l3_512",
        mesa=6.0,
        drop_path_rate=0.5,
        weight_decay=0.12,
        image_size=512,
        crop_pct=0.93,
        crop_mode="squash",
    )
