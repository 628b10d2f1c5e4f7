"""The recipes of Vim's released scripts: DeiT's, in float32, and a fine-tuning with overlapping patches.

Augmentation is repeated: an epoch shows a third of the images, each three times. The learning rate changes once an
epoch, one epoch late, and the warm-up hides the first epochs of a cosine over all of them. The paper differs from the
scripts: weight decay 0.05 for Ti too, batches of 1024 for S too.

Fine-tuning starts from ``config.init_from``: official weights or a run of the model of stride 16. The position
embedding is resized as in the official code.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def recipe(model: str, *, batch_size: int, weight_decay: float, drop_path_rate: float) -> Config:
    """Return the recipe of pre-training for ``model``."""
    return Config(
        model=ModelConfig(name=model, drop_path_rate=drop_path_rate, dtype="float32"),
        data=DataConfig(
            name="imagenet2012",
            exif_orientation=False,
            auto_augment="rand-m9-mstd0.5-inc1",
            repeated_aug=3,
            mixup=0.8,
            cutmix=1.0,
            mixup_batch=batch_size // 8,
        ),
        optim=OptimConfig(
            lr=1e-3,
            min_lr=1e-5,
            warmup_lr=1e-6,
            warmup=Duration(epochs=5),
            warmup_prefix=False,
            lr_changes="epoch",
            weight_decay=weight_decay,
            clip_norm=0.0,
            ema_decay=0.99996,
        ),
        batch_size=batch_size,
        duration=Duration(epochs=300),
    )


def fine_tuning(model: str) -> Config:
    """Return the recipe of fine-tuning for ``model``: 30 epochs at a rate that stays as it is."""
    config = recipe(model, batch_size=1024, weight_decay=1e-8, drop_path_rate=0.0)
    config.optim.lr = config.optim.min_lr = config.optim.warmup_lr = 1e-5
    config.duration = Duration(epochs=30)
    return config
