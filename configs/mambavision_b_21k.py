"""MambaVision-B-21K on ImageNet-1K, 224 px.

Published top-1: 84.9 (the official README). Not yet run here.
320 epochs: 99,840 steps of 4,096 images, 408,944,640 in all.

Published after pre-training on ImageNet-21K, which is not this run; neither that recipe nor the fine-tuning one was
released, so this is the recipe of B without it.
"""

from evmamba_jax.recipes.mambavision import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe(
        "mambavision_b_21k", mesa=1.0, mesa_epoch=94, drop_path_rate=0.3, weight_decay=0.075, warmup_epochs=35
    )
