"""A small EfficientVMamba on Fashion-MNIST: 60000 images of clothes to train, 10000 to test, 28x28 pixels, grey.

The released recipe in small: warm-up by the step, light augmentation, no moving average. 2 epochs: 1,874 steps of 64
images, 119,936 in all; 85 % of the test images are then right (benchmarks/results/fashion_mnist.md). The images are
Debian's: apt-get install dataset-fashion-mnist.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def get_config() -> Config:
    """Return the configuration."""
    return Config(
        model=ModelConfig(
            name="evmamba_t",
            drop_path_rate=0.05,
            dtype="float32",
            # Scans over 7x7 and 4x4 maps, the first padded to 8x8; inverted residuals over 2x2 and 1x1.
            options={"width": 16, "depths": (1, 1, 1, 1)},
        ),
        data=DataConfig(
            name="fashion_mnist_debian",
            eval_split="test",
            image_size=28,
            crop_pct=1.0,
            in_channels=1,
            mean=(0.286,),  # of the training images, in [0, 1]
            std=(0.353,),
            crop_scale=(0.6, 1.0),
            random_erasing=0.0,
            mixup=0.2,
            cutmix=0.0,
        ),
        optim=OptimConfig(lr=2e-3, warmup=Duration(epochs=0.25), lr_changes="step", ema_decay=0.0),
        batch_size=64,
        duration=Duration(epochs=2),
        log_every=Duration(steps=50),
        eval_every=Duration(epochs=0.5),
        save_every=Duration(epochs=0.5),
    )
