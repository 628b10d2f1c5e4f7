"""The recipe of MambaVision's released 1K models: LAMB, MESA's self-distillation, and a cool-down.

The 320 epochs are 310 of a cosine and 10 at the smallest rate; the warm-up hides the beginning of the cosine. MESA
begins with the first epoch after a quarter of the 310, for B after three tenths. The paper's text has 300 epochs at
4e-3.

Pictures are evaluated as the official model cards say, which is not always what the training files say: the short side
is resized to the input size over the card's crop ratio. The two 512 px cards squash both sides to it instead.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def recipe(
    model: str,
    *,
    mesa: float,
    mesa_epoch: int = 78,
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
            exif_orientation=False,
            image_size=image_size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation="random",
            auto_augment="rand-m9-mstd0.5-inc1",
            mixup=0.8,
            cutmix=1.0,
            mixup_batch=128,
        ),
        optim=OptimConfig(
            name="lamb",
            lr=5e-3,
            min_lr=5e-6,
            warmup_lr=1e-6,
            warmup=Duration(epochs=warmup_epochs),
            warmup_prefix=False,
            cooldown=Duration(epochs=10),
            lr_changes="step",
            weight_decay=weight_decay,
            clip_norm=5.0,
            ema_decay=0.9998,
            mesa=mesa,
            mesa_start=Duration(epochs=mesa_epoch),
        ),
        seed=31,
        batch_size=4096,
        duration=Duration(epochs=320),
    )
