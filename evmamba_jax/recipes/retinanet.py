"""The recipe of RetinaNet on COCO, mmdet's 1x: 12 epochs of 16 images, a tenth of the rate after 8 and after 11.

EfficientVMamba's paper has results and neither files nor settings; the optimizer is the one of PVT's detectors, with
which it compares: AdamW with the same weight decay for everything, 500 iterations of warm-up from a thousandth of the
rate, no clipping. mmdet counts an epoch's last, smaller batch; here an epoch has whole batches.
"""

from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig
from evmamba_jax.training.config import Duration, ModelConfig, OptimConfig


def recipe(
    backbone: str,
    *,
    drop_path_rate: float = 0.2,
    width: int = 256,
    dtype: str = "float32",
    init_from: str = "official",
) -> DetectionConfig:
    """Return the recipe of RetinaNet over ``backbone``.

    Args:
        backbone: one of :func:`evmamba_jax.list_models` with maps of four sizes.
        drop_path_rate: of the backbone.
        width: channels of pyramid and head.
        dtype: "bfloat16" where the official detectors of this backbone are of mixed precision.
        init_from: the weights to start from; "" where the released file has no address of its own.
    """
    return DetectionConfig(
        model=ModelConfig(name=backbone, drop_path_rate=drop_path_rate, dtype=dtype),
        detector=DetectorConfig(width=width),
        data=DetectionData(),
        optim=OptimConfig(
            lr=1e-4,
            schedule="milestones",
            milestones=(8.0, 11.0),
            min_lr=0.0,
            warmup_lr=1e-7,
            warmup=Duration(steps=500),
            lr_changes="step",
            weight_decay=1e-4,
            no_decay="nothing",
            clip_norm=0.0,
            ema_decay=0.0,
        ),
        batch_size=16,
        duration=Duration(epochs=12),
        eval_every=Duration(epochs=1),
        save_every=Duration(epochs=1),
        init_from=init_from,
    )
