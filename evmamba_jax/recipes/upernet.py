"""The recipe of UperNet on ADE20K: mmseg's for Swin, as the files of VMamba, MSVMamba and MambaVision have it.

160,000 iterations of 16 images from released ImageNet weights: AdamW, 1,500 iterations of warm-up from a millionth of
the rate, then a line to 0; no clipping and no moving average. Weight decay touches all but what has "norm" in its
official name.

Vim's is of its own, by mmseg 0.x: 60,000 iterations of 32 images, a warm-up that scales the line, and windows to test.
"""

from typing import Any

from evmamba_jax.data.dense_config import SegmentationData
from evmamba_jax.tasks.segmentation import SegmentationConfig, SegmenterConfig
from evmamba_jax.training.config import Duration, ModelConfig, OptimConfig, TuneConfig


def recipe(
    backbone: str,
    *,
    drop_path_rate: float,
    width: int = 512,
    image_size: int = 512,
    lr: float = 6e-5,
    weight_decay: float = 0.01,
    dtype: str = "float32",
    eval_steps: int = 16_000,
    init_from: str = "official",
) -> SegmentationConfig:
    """Return the recipe of UperNet over ``backbone``.

    Args:
        backbone: one of :func:`evmamba_jax.list_models`.
        drop_path_rate: of the backbone.
        width: channels of the head.
        image_size: side of the crops, pixels, and the shorter side of the images that are tested.
        lr: peak of the learning rate.
        weight_decay: of AdamW.
        dtype: "bfloat16" where the official runs are of mixed precision.
        eval_steps: iterations from one evaluation to the next.
        init_from: the weights to start from; "" where the released file has no address of its own.
    """
    return SegmentationConfig(
        model=ModelConfig(name=backbone, drop_path_rate=drop_path_rate, dtype=dtype),
        segmenter=SegmenterConfig(width=width),
        data=SegmentationData(image_size=image_size, scale=(4 * image_size, image_size)),
        optim=_optim(lr, weight_decay, no_decay="norm_names"),
        batch_size=16,
        init_from=init_from,
        **_lengths(160_000, eval_steps),
    )


def vim(backbone: str, *, width: int, lr: float, weight_decay: float, layer_decay: float) -> SegmentationConfig:
    """Return the recipe of UperNet over Vim.

    The official rate falls by ``layer_decay`` a layer, but by names that Vim's blocks do not have: they keep the whole
    rate, and the embeddings, 25 layers below, have what is left of it. Weight decay spares biases and what has one
    axis; the position embedding is to be spared by a name which it does not have there, and is decayed.

    Args:
        backbone: "vim_t" or "vim_s".
        width: of backbone and head.
        lr: peak of the learning rate.
        weight_decay: of AdamW.
        layer_decay: factor of the rate a layer.

    Source: hustvl/Vim ``seg/mmcv_custom/layer_decay_optimizer_constructor.py`` and ``seg/scripts`` at dd0358a.
    """
    config = SegmentationConfig(
        model=ModelConfig(name=backbone, drop_path_rate=0.1, dtype="float32", options={"image_size": 512}),
        segmenter=SegmenterConfig(width=width),
        data=SegmentationData(test="slide"),
        optim=_optim(lr, weight_decay, no_decay="vectors"),
        tune=TuneConfig(embed_lr=layer_decay**25),
        batch_size=32,
        init_from="official",
        **_lengths(60_000, 1000),
    )
    config.optim.warmup_prefix = False
    return config


def _optim(lr: float, weight_decay: float, *, no_decay: str) -> OptimConfig:
    return OptimConfig(
        lr=lr,
        schedule="poly",
        min_lr=0.0,
        warmup_lr=1e-6 * lr,
        warmup=Duration(steps=1500),
        lr_changes="step",
        weight_decay=weight_decay,
        no_decay=no_decay,
        clip_norm=0.0,
        ema_decay=0.0,
    )


def _lengths(steps: int, eval_steps: int) -> dict[str, Any]:
    between = Duration(steps=eval_steps)
    return {"duration": Duration(steps=steps), "eval_every": between, "save_every": between}
