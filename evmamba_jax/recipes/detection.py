"""The recipes of detectors on COCO: mmdet's 1x of 12 epochs and 3x of 36, 16 images a step; and Vim's, as ViTDet's.

AdamW, a tenth of the rate twice towards the end, no clipping and no moving average. mmdet counts an epoch's last,
smaller batch; here an epoch has whole batches.

Source: mmdet 3.3.0 ``configs/swin`` and the configurations of EfficientVMamba, VMamba, MSVMamba and MambaVision;
hustvl/Vim ``det/projects/ViTDet``.
"""

from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig
from evmamba_jax.training.config import Duration, ModelConfig, OptimConfig, TuneConfig

DROPS = {12: (8.0, 11.0), 36: (27.0, 33.0)}  # of the rate, epochs, by the epochs of the run
COCO_IMAGES = 117_266  # for training, with objects


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
    optim = _optim(1e-4, warmup=500, weight_decay=1e-4, no_decay="nothing", milestones=DROPS[12])
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
    optim = _optim(1e-4, warmup=1000, weight_decay=0.05, no_decay="norm_names", milestones=DROPS[epochs])
    return _recipe(backbone, detector, optim, epochs, drop_path_rate=drop_path_rate, dtype=dtype, init_from=init_from)


def cascade_mask_rcnn(backbone: str, *, lr: float = 1e-4) -> DetectionConfig:
    """Return the recipe of Cascade Mask R-CNN over a MambaVision, 3x with mixed precision.

    Args:
        backbone: its name.
        lr: peak of the learning rate.
    """
    detector = DetectorConfig(name="cascade_mask_rcnn")
    optim = _optim(lr, warmup=1000, weight_decay=0.05, no_decay="norm_names", milestones=DROPS[36])
    return _recipe(backbone, detector, optim, 36, drop_path_rate=0.2, dtype="bfloat16", init_from="official")


def vim_cascade(backbone: str) -> DetectionConfig:
    """Return the recipe of Vim's detector: 184,375 iterations of 64 images, on squares of 1024 pixels.

    The rate falls by 0.837 a layer, and weight decay spares the position embedding alone. The official file asks to
    spare norms too, but Detectron2 finds them by PyTorch's classes, and none of the detector's norms is of one.
    Detectron2's warm-up reaches the whole rate with step 250, the step after it; as lengths are counted here, it takes
    251.

    Args:
        backbone: "vim_t" or "vim_s".

    Source: hustvl/Vim ``det/projects/ViTDet/configs/COCO/mask_rcnn_vimdet_b_100ep.py``,
    ``cascade_mask_rcnn_vimdet_t_100ep_adj1.py``, ``cascade_mask_rcnn_vimdet_s_100ep.py`` and
    ``det/detectron2/solver/build.py`` at dd0358a.
    """
    batch, between = 64, Duration(steps=5000)
    milestones = tuple(step / (COCO_IMAGES // batch) for step in (163_889, 177_546))
    return DetectionConfig(
        model=ModelConfig(name=backbone, drop_path_rate=0.1, dtype="bfloat16"),
        detector=DetectorConfig(name="vim_cascade"),
        data=DetectionData(augment="large_scale_jitter", scale=(1024, 1024)),
        optim=_optim(1e-4, warmup=251, weight_decay=0.1, no_decay="positions", milestones=milestones),
        tune=TuneConfig(layer_decay=0.837),
        batch_size=batch,
        duration=Duration(steps=184_375),
        eval_every=between,
        save_every=between,
        init_from="official",
    )


def _optim(lr: float, *, warmup: int, weight_decay: float, no_decay: str, milestones: tuple[float, ...]) -> OptimConfig:
    return OptimConfig(
        lr=lr,
        schedule="milestones",
        milestones=milestones,
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
