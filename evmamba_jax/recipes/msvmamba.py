"""The recipe of MSVMamba, in both versions: VMamba's, with other rates for Base.

The learning rates are what the official code has after scaling with the batch size: 5e-4 for every 512 images, 3e-4
for Base. Its colour jitter of 0.4 has no effect beside RandAugment.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def recipe(model: str, *, drop_path_rate: float, lr: float = 1e-3, min_lr: float = 1e-5) -> Config:
    """Return the recipe for ``model``; its drop path, and for Base the learning rates, differ from the other sizes'."""
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
            lr=lr,
            min_lr=min_lr,
            warmup_lr=1e-6,
            warmup=Duration(epochs=20),
            lr_changes="step",
            weight_decay=0.05,
            clip_norm=5.0,
        ),
        batch_size=1024,
        duration=Duration(epochs=300),
    )
