"""The recipe of small models on scenes of digits, for whatever stands on their backbone."""

from typing import Any

from evmamba_jax.data.dense_config import DenseData
from evmamba_jax.training.config import Duration, ModelConfig, OptimConfig


def recipe(data: type[DenseData], *, lr: float, epochs: float, **more: Any) -> dict[str, Any]:
    """Return the fields that such configurations share.

    Args:
        data: the class of what they read.
        lr: the highest learning rate.
        epochs: length of the run.
        more: fields of it. Scenes come as they are: a digit mirrored or cut is none.
    """
    return dict(  # noqa: C408
        model=ModelConfig(
            name="evmamba_t",
            drop_path_rate=0.0,
            dtype="float32",
            options={"width": 32, "depths": (1, 1, 1, 1), "d_state": 4},
        ),
        data=data(
            name="digit_scenes",
            eval_split="test",
            image_size=128,
            scale=(128, 128),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            hflip=0.0,
            eval_padding="buckets",
            **more,
        ),
        optim=OptimConfig(
            lr=lr, min_lr=0.0, warmup=Duration(steps=150), lr_changes="step", weight_decay=0.01, ema_decay=0.0
        ),
        batch_size=4,
        duration=Duration(epochs=epochs),
        log_every=Duration(steps=100),
        eval_every=Duration(epochs=1),
        save_every=Duration(epochs=1),
    )
