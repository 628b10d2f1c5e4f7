"""The recipe of small models on Fashion-MNIST, ours: EfficientVMamba's in small, with a warm-up by the step."""

from typing import Any

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def recipe(model: str, *, batch_size: int, epochs: float, evaluations: int, **options: Any) -> Config:
    """Return the recipe for ``model`` with ``options``, float32, without a moving average."""
    between = Duration(epochs=epochs / evaluations)
    return Config(
        model=ModelConfig(name=model, drop_path_rate=0.05, dtype="float32", options=options),
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
        batch_size=batch_size,
        duration=Duration(epochs=epochs),
        log_every=Duration(steps=50),
        eval_every=between,
        save_every=between,
    )
