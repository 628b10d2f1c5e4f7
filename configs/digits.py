"""A small EfficientVMamba on scikit-learn's digits: 1437 images to train, 360 to test, 8x8 pixels, grey.

60 epochs: 1,320 steps of 64 images, 84,480 in all.

The default run of the project: it needs no download and exercises every part that ImageNet training uses.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def get_config() -> Config:
    """Return the configuration."""
    return Config(
        model=ModelConfig(
            name="evmamba_t",
            drop_path_rate=0.0,
            dtype="float32",
            # Patches of one pixel: scans over 8x8 and 4x4 maps, inverted residuals over 2x2 and 1x1.
            options={"width": 24, "depths": (1, 1, 1, 1), "patch_size": 1, "d_state": 8},
        ),
        data=DataConfig(
            name="digits",
            eval_split="test",
            image_size=8,
            crop_pct=1.0,
            in_channels=1,
            mean=(0.3,),  # of the training images, in [0, 1]
            std=(0.38,),
            crop_scale=(0.6, 1.0),
            hflip=0.0,
            random_erasing=0.0,
            mixup=0.2,
            cutmix=0.0,
        ),
        optim=OptimConfig(lr=2e-3, warmup=Duration(epochs=3), weight_decay=0.05, ema_decay=0.99),
        batch_size=64,
        duration=Duration(epochs=60),
        log_every=Duration(steps=20),
        eval_every=Duration(epochs=10),
        save_every=Duration(epochs=10),
    )
