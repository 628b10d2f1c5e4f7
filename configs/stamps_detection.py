"""Mask R-CNN over a small EfficientVMamba on stamps pasted on photographs: box and mask of ten classes of things.

6 epochs: 4,500 steps of 4 images, 18,000 in all.

A harder proof than digits: 2 to 5 stamps in colour on each picture of 192x192 pixels, and the 200 test pictures show
stamps that were never seen. The backbone is the classifier that ``configs/stamps.py`` trains, so that comes first:

    apt-get install tuxpaint-stamps-default
    python train_tpu.py --config configs/stamps.py --workdir runs/stamps
    python -m evmamba_jax.data prepare stamp_scenes
    python train_tpu.py --config configs/stamps_detection.py
"""

from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.recipes.stamps import MEAN, STD, backbone
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig
from evmamba_jax.training.config import Duration, OptimConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return DetectionConfig(
        model=backbone(),
        detector=DetectorConfig(
            name="mask_rcnn", width=48, fc_width=256, regions=64, proposals=200, detections=20, init_std=0.05
        ),
        data=DetectionData(
            name="stamp_scenes",
            eval_split="test",
            scale=(192, 192),
            mean=MEAN,
            std=STD,
            eval_padding="buckets",
            max_objects=5,
        ),
        optim=OptimConfig(
            lr=2e-3, min_lr=0.0, warmup=Duration(steps=300), lr_changes="step", weight_decay=0.05, ema_decay=0.0
        ),
        batch_size=4,
        duration=Duration(epochs=6),
        log_every=Duration(steps=100),
        eval_every=Duration(epochs=1),
        save_every=Duration(epochs=1),
        init_from="runs/stamps",
    )
