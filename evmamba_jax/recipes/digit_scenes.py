"""The recipe of small models on scenes of digits, for whatever stands on their backbone."""

import dataclasses
from typing import Any

from evmamba_jax.data.dense_config import DenseData, DetectionData
from evmamba_jax.errors import one_of
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig
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


# By name the detector, the highest learning rate, and the length of the run in epochs.
_DETECTORS = {
    "retinanet": (DetectorConfig(width=48, octave_base_scale=2.0, detections=20), 3e-3, 4.5),
    # Few boxes: of a scene's 8 digits at most all are of the size of the finest anchors.
    "mask_rcnn": (
        DetectorConfig(
            name="mask_rcnn",
            width=32,
            fc_width=128,
            octave_base_scale=4.0,
            regions=32,
            proposals=100,
            detections=20,
        ),
        3e-3,
        3.0,
    ),
}


def detection(detector: str) -> DetectionConfig:
    """Return the configuration of a detector of digits.

    Args:
        detector: "retinanet" or "mask_rcnn".

    Raises:
        UserError: another one.
    """
    about, lr, epochs = one_of("detector of digits", detector, _DETECTORS)
    shared = recipe(DetectionData, lr=lr, epochs=epochs, max_objects=8)
    return DetectionConfig(detector=dataclasses.replace(about), **shared)
