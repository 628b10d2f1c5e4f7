"""The three recipes of EfficientVMamba, which do not agree with each other.

The released weights come from the ``released`` one, read off their training logs. Its RandAugment and the paper's has
operations of its own, the README's has timm's.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig

VARIANTS = ("released", "paper", "readme")


def recipe(model: str, *, batch_size: int, variant: str) -> Config:
    """Return a recipe for ``model``; ``batch_size`` is what its released run had."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}{nearest(variant, VARIANTS)}; known: {', '.join(VARIANTS)}")
    config = Config(
        model=ModelConfig(name=model, drop_path_rate=0.1),
        data=DataConfig(
            name="imagenet2012",
            exif_orientation=False,
            auto_augment="evmamba-m9-mstd0.5",
            mixup=0.2,
            cutmix=1.0,
            mixup_batch=batch_size // 16,
        ),
        optim=OptimConfig(
            lr=2e-3, min_lr=1e-6, warmup_lr=1e-7, warmup=Duration(epochs=20), weight_decay=0.04, clip_norm=1.0
        ),
        seed=42,
        batch_size=batch_size,
        duration=Duration(epochs=300),
    )
    if variant == "paper":  # what the text gives; it is silent on the rest
        config.batch_size, config.seed, config.optim.lr = 1024, 0, 1e-3
        config.data.mixup_batch = 128
    if variant == "readme":  # main.py with its yaml: Swin's trainer
        config.batch_size, config.seed = 1024, 0
        config.model.drop_path_rate = 0.2
        config.data.auto_augment, config.data.mixup = "rand-m9-mstd0.5-inc1", 0.8
        config.data.mixup_batch = 128
        config.optim = OptimConfig(
            lr=1e-3,
            min_lr=1e-5,
            warmup_lr=1e-6,
            warmup=Duration(epochs=20),
            lr_changes="step",
            weight_decay=0.05,
            clip_norm=5.0,
        )
    return config
