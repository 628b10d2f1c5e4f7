"""Fine-tuning on pictures of your own, any model: --config finetune:vmamba_t --config.data.data_dir=DIR.

The advised recipe for small data, of our own; no results are published for it. The model starts from the released file
of its card and sees pictures as the card prepares them. The learning rate falls from the head down, the moving average
warms up, and the run ends when five evaluations in a row find nothing better.
"""

from evmamba_jax import model_card
from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig, TuneConfig


def get_config(model: str = "evmamba_t") -> Config:
    """Return the configuration for a registered model."""
    card = model_card(model)
    return Config(
        model=ModelConfig(name=model, drop_path_rate=0.1),
        data=DataConfig(
            name="folder",
            image_size=card.input_size[0],
            crop_pct=card.crop,
            crop_mode=card.crop_mode,
            eval_interpolation=card.interpolation,
            mean=card.mean,
            std=card.std,
            crop_scale=(0.3, 1.0),
            auto_augment="rand-m6-mstd0.5-inc1",
            random_erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
            on_corrupt="skip",
        ),
        optim=OptimConfig(
            lr=5e-4,
            warmup=Duration(epochs=2),
            lr_changes="step",
            weight_decay=0.05,
            ema_decay=0.999,
            ema_warmup=True,
        ),
        tune=TuneConfig(layer_decay=0.8, head_lr=5.0),
        batch_size=32,
        duration=Duration(epochs=30),
        log_every=Duration(steps=10),
        eval_every=Duration(epochs=1),
        save_every=Duration(epochs=1),
        early_stopping=5,
        init_from="official",
    )
