"""A small EfficientVMamba on Tux Paint's stamps, pasted on photographs: 10 classes, in colour, 5122 images to train.

The images are of 197 stamps; 260 of 65 others validate and 264 of 66 others test, so what counts is what a bird or a
fruit looks like, not which one was seen. 20 epochs: 1,600 steps of 64 images, 102,400 in all. The stamps are
Debian's: apt-get install tuxpaint-stamps-default; then python -m evmamba_jax.data prepare stamps, or training, prepares
them.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.recipes.stamps import MEAN, STD, backbone
from evmamba_jax.training.config import Config, Duration, OptimConfig


def get_config() -> Config:
    """Return the configuration."""
    return Config(
        model=backbone(),
        data=DataConfig(
            name="stamps",
            image_size=48,
            crop_pct=1.0,
            mean=MEAN,
            std=STD,
            crop_scale=(0.5, 1.0),
            random_erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
        ),
        optim=OptimConfig(
            lr=2e-3, warmup=Duration(epochs=1), lr_changes="step", weight_decay=0.05, ema_decay=0.99, ema_warmup=True
        ),
        batch_size=64,
        duration=Duration(epochs=20),
        log_every=Duration(steps=20),
        eval_every=Duration(epochs=2),
        save_every=Duration(epochs=2),
    )
