"""The recipe of VMamba: Swin's, with more drop path in larger models and an average of the weights.

The learning rates are what the official code has after scaling with the batch size: 5e-4 for every 512 images. Its
colour jitter of 0.4 has no effect beside RandAugment.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def recipe(model: str, *, drop_path_rate: float, ema_decay: float = 0.9999) -> Config:
    """Return the recipe for ``model``, which differs from the other sizes' in its drop path only."""
    return Config(
        model=ModelConfig(name=model, drop_path_rate=drop_path_rate),
        data=DataConfig(
            name="imagenet2012",
            exif_orientation=False,
            auto_augment="rand-m9-mstd0.5-inc1",
            mixup=0.8,
            cutmix=1.0,
            mixup_batch=128,
        ),
        optim=OptimConfig(
            lr=1e-3,
            min_lr=1e-5,
            warmup_lr=1e-6,
            warmup=Duration(epochs=20),
            lr_changes="step",
            weight_decay=0.05,
            clip_norm=5.0,
            ema_decay=ema_decay,
        ),
        batch_size=1024,
        duration=Duration(epochs=300),
    )
