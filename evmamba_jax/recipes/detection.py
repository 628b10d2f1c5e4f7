"""The recipes of detectors on COCO: mmdet's 1x of 12 epochs and 3x of 36, 16 images a step.

AdamW, a tenth of the rate after two thirds and after eleven twelfths of the run, no clipping and no moving average.
mmdet counts an epoch's last, smaller batch; here an epoch has whole batches.

Source: mmdet 3.3.0 ``configs/swin`` and the configurations of EfficientVMamba, VMamba, MSVMamba and MambaVision;
hustvl/Vim ``det/projects/ViTDet``.
"""

from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig
from evmamba_jax.training.config import Duration, ModelConfig, OptimConfig

DROPS = {12: (8.0, 11.0), 36: (27.0, 33.0)}  # of the rate, epochs, by the epochs of the run


def retinanet(
    backbone: str,
    *,
    drop_path_rate: float = 0.2,
    width: int = 256,
    dtype: str = "float32",
    init_from: str = "official",
) -> DetectionConfig:
    """Return the recipe of RetinaNet over ``backbone``, 1x.

    EfficientVMamba's paper has results and neither files nor settings; the optimizer is the one of PVT's detectors,
    with which it compares: weight decay for everything, and 500 iterations of warm-up.

    Args:
        backbone: one of :func:`evmamba_jax.list_models` with maps of four sizes.
        drop_path_rate: of the backbone.
        width: channels of pyramid and head.
        dtype: "bfloat16" where the official detectors of this backbone are of mixed precision.
        init_from: the weights to start from; "" where the released file has no address of its own.
    """
    detector = DetectorConfig(name="retinanet", width=width)
    optim = _optim(1e-4, warmup=500, weight_decay=1e-4, no_decay="nothing")
    return _recipe(backbone, detector, optim, 12, drop_path_rate=drop_path_rate, dtype=dtype, init_from=init_from)


def mask_rcnn(
    backbone: str,
    *,
    epochs: int = 12,
    drop_path_rate: float = 0.2,
    width: int = 256,
    fc_width: int = 1024,
    dtype: str = "float32",
    init_from: str = "official",
) -> DetectionConfig:
    """Return the recipe of Mask R-CNN over ``backbone``: 1000 iterations of warm-up, no weight decay for norms.

    Args:
        backbone: one of :func:`evmamba_jax.list_models` with maps of four sizes.
        epochs: 12, or 36 with images of several scales.
        drop_path_rate: of the backbone.
        width: channels of pyramid and convolutions.
        fc_width: channels of the box head.
        dtype: "bfloat16" where the official run is of mixed precision.
        init_from: as for :func:`retinanet`.
    """
    detector = DetectorConfig(name="mask_rcnn", width=width, fc_width=fc_width)
    optim = _optim(1e-4, warmup=1000, weight_decay=0.05, no_decay="norm_names")
    return _recipe(backbone, detector, optim, epochs, drop_path_rate=drop_path_rate, dtype=dtype, init_from=init_from)


def cascade_mask_rcnn(backbone: str, *, lr: float = 1e-4) -> DetectionConfig:
    """Return the recipe of Cascade Mask R-CNN over a MambaVision, 3x with mixed precision.

    Args:
        backbone: its name.
        lr: peak of the learning rate.
    """
    detector = DetectorConfig(name="cascade_mask_rcnn")
    optim = _optim(lr, warmup=1000, weight_decay=0.05, no_decay="norm_names")
    return _recipe(backbone, detector, optim, 36, drop_path_rate=0.2, dtype="bfloat16", init_from="official")


def _optim(lr: float, *, warmup: int, weight_decay: float, no_decay: str) -> OptimConfig:
    return OptimConfig(
        lr=lr,
        schedule="milestones",
        min_lr=0.0,
        warmup_lr=1e-3 * lr,
        warmup=Duration(steps=warmup),
        lr_changes="step",
        weight_decay=weight_decay,
        no_decay=no_decay,
        clip_norm=0.0,
        ema_decay=0.0,
    )


def _recipe(
    backbone: str,
    detector: DetectorConfig,
    optim: OptimConfig,
    epochs: int,
    *,
    drop_path_rate: float,
    dtype: str,
    init_from: str,
) -> DetectionConfig:
    optim.milestones = DROPS[epochs]
    return DetectionConfig(
        model=ModelConfig(name=backbone, drop_path_rate=drop_path_rate, dtype=dtype),
        detector=detector,
        data=DetectionData(augment="multi_scale" if epochs == 36 else "one_scale"),
        optim=optim,
        batch_size=16,
        duration=Duration(epochs=epochs),
        eval_every=Duration(epochs=1),
        save_every=Duration(epochs=1),
        init_from=init_from,
    )
