"""EfficientVMamba-T, fine-tuned on ImageNet-1K at 384 px.

30 epochs: 37,530 steps of 1,024 images, 38,430,720 in all.

Not published, not yet run here. Rates, weight decay and length are from Swin's fine-tuning at this size
(swin_base_patch4_window12_384_finetune.yaml, after its scaling with the batch size), the rest is as in the training of
EfficientVMamba's released weights. It starts from official weights, a converted model or a run:

    python train_tpu.py --config configs/evmamba_t_384.py --config.init_from=FILE_OR_FOLDER
"""

from evmamba_jax.recipes.efficientvmamba import recipe
from evmamba_jax.training.config import Config, Duration, OptimConfig


def get_config() -> Config:
    """Return the configuration."""
    config = recipe("evmamba_t", batch_size=1024, variant="released")
    config.data.image_size, config.data.crop_pct, config.data.crop_mode = 384, 1.0, "squash"
    config.optim = OptimConfig(
        lr=4e-5,
        min_lr=4e-7,
        warmup_lr=4e-8,
        warmup=Duration(epochs=5),
        lr_changes="step",
        weight_decay=1e-8,
        clip_norm=5.0,
    )
    config.duration = Duration(epochs=30)
    return config
