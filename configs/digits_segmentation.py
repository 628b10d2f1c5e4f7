"""A small EfficientVMamba with UperNet on scenes of digits: which of ten digits each pixel belongs to, or the ground.

3 epochs: 750 steps of 16 images, 12,000 in all.

The first label map of a newcomer: it needs no download. The scenes are made as they are read, 128x128 pixels, 3 to 8
digits that hide up to 30 % of one another; 4,000 to train, 200 of other digits to test.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.tasks.segmentation import SegmentationConfig, SegmenterConfig
from evmamba_jax.training.config import Duration, ModelConfig, OptimConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return SegmentationConfig(
        model=ModelConfig(
            name="evmamba_t",
            drop_path_rate=0.0,
            dtype="float32",
            options={"width": 16, "depths": (1, 1, 1, 1), "d_state": 4},
        ),
        segmenter=SegmenterConfig(width=32, aux_width=16, dropout=0.0),
        data=DataConfig(
            name="digit_scenes",
            eval_split="test",
            image_size=128,
            crop_pct=1.0,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            hflip=0.0,
            random_erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
            label_smoothing=0.0,
        ),
        optim=OptimConfig(
            lr=4e-3, min_lr=0.0, warmup=Duration(steps=40), lr_changes="step", weight_decay=0.01, ema_decay=0.0
        ),
        batch_size=16,
        duration=Duration(epochs=3),
        log_every=Duration(steps=25),
        eval_every=Duration(epochs=1),
        save_every=Duration(epochs=1),
    )
