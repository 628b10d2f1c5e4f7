"""The recipe of MambaVision's released 1K models, as far as this library has its parts.

Not here yet: LAMB (learning rate 5e-3, with a second clipping at norm 1), MESA's self-distillation from the averaged
model after a quarter of the run, and 10 epochs of cool-down at the smallest rate after the 310. Meanwhile AdamW takes
LAMB's place, at 4e-3, the rate in the paper's text; the rest is as published, but for the cosine, which here begins
after the warm-up and there with it.

Pictures are evaluated as the official model cards say, which is not always what the training files say: the short side
is resized to the input size over the card's crop ratio. The two 512 px cards squash both sides to it instead.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def recipe(
    model: str,
    *,
    drop_path_rate: float = 0.2,
    weight_decay: float = 0.05,
    warmup_epochs: int = 20,
    image_size: int = 224,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
) -> Config:
    """Return the recipe for ``model``."""
    return Config(
        model=ModelConfig(name=model, drop_path_rate=drop_path_rate),
        data=DataConfig(
            name="imagenet2012",
            image_size=image_size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation="random",
            auto_augment="rand-m9-mstd0.5-inc1",
            mixup=0.8,
            cutmix=1.0,
        ),
        optim=OptimConfig(
            lr=4e-3,
            min_lr=5e-6,
            warmup_lr=1e-6,
            warmup=Duration(epochs=warmup_epochs),
            warmup_by_epoch=False,
            weight_decay=weight_decay,
            clip_norm=5.0,
            ema_decay=0.9998,
        ),
        seed=31,
        batch_size=4096,
        duration=Duration(epochs=310),
    )
