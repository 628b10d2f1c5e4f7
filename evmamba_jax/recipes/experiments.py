"""One recipe for all experiments of ``configs/experiments``, so that their rows can be compared.

A variant is words joined with "_": a data set, cifar10 (the default), cifar100, or one that needs no network, "fashion"
or "digits", with smaller models; "course", the course project's model in place of Vim; "notebook", the settings of the
course's notebooks.
"""

from collections.abc import Mapping
from typing import Any

from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig

_GREY = {"mean": (0.29,) * 3, "std": (0.35,) * 3}
_10 = {"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.244, 0.262)}
_100 = {"mean": (0.507, 0.487, 0.441), "std": (0.267, 0.256, 0.276)}
_DATA = {  # and the batch, the rate, how many epochs, how many evaluations
    "cifar10": (DataConfig(name="cifar10", **_10), 256, 1e-3, 100, 10),
    "cifar100": (DataConfig(name="cifar100", **_100), 256, 1e-3, 100, 10),
    "fashion": (DataConfig(name="fashion_mnist_debian", **_GREY), 64, 4e-3, 0.25, 2),
    "digits": (DataConfig(name="digits", hflip=0.0, **_GREY), 64, 4e-3, 20, 10),
}
_OFFLINE = ("fashion", "digits")

# The models, as they are and small for what needs no network. "vim" is Vim, "course" is not.
_MODELS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "vim": (
        ModelConfig(name="vim_t", options={"depth": 12, "patch_size": 4, "stride": 4, "image_size": 32}),
        {"width": 32, "depth": 2},
    ),
    "course": (ModelConfig(name="course_vim"), {"width": 32, "depth": 2, "d_state": 16, "dt_rank": 8}),
    "mambavision": (
        ModelConfig(name="mambavision_t"),
        {"width": 16, "stem_width": 16, "depths": (1, 1, 2, 2), "num_heads": (2, 2, 4, 4), "window_size": (8, 8, 4, 2)},
    ),
}


def recipe(variant: str, *, vision: bool = False, options: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """Return the configuration of a variant.

    Args:
        variant: words joined with "_"; empty for Vim (MambaVision) on cifar10.
        vision: a MambaVision in place of Vim and the course's model.
        options: of the model, by its family: "vim", "course", "mambavision".

    Raises:
        UserError: an unknown word.
    """
    words = [word for word in variant.split("_") if word]
    known = [*_DATA, *(() if vision else ("course", "vim", "notebook"))]
    for word in words:
        if word not in known:
            raise UserError(f"variant {variant!r} has the word {word!r}; allowed, joined with '_': {', '.join(known)}")
    data = next((word for word in words if word in _DATA), "cifar10")
    family = "mambavision" if vision else "course" if {"course", "notebook"} & set(words) else "vim"
    about, batch_size, lr, epochs, evaluations = _DATA[data]
    model, small = _MODELS[family]
    chosen = model.options | (small if data in _OFFLINE else {}) | dict((options or {}).get(family, {}))
    config = Config(
        model=ModelConfig(name=model.name, drop_path_rate=0.0, dtype="float32", options=chosen),
        data=DataConfig(
            name=about.name,
            eval_split="test",
            image_size=32,
            crop_pct=1.0,
            mean=about.mean,
            std=about.std,
            pad_crop=4,
            hflip=about.hflip,
            random_erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
            label_smoothing=0.0,
        ),
        optim=OptimConfig(
            lr=lr,
            min_lr=0.0,
            warmup=Duration(epochs=0.05 * epochs),
            lr_changes="step",
            weight_decay=0.05,
            ema_decay=0.0,
        ),
        batch_size=batch_size,
        duration=Duration(epochs=epochs),
        log_every=Duration(epochs=epochs / 100),
        eval_every=Duration(epochs=epochs / evaluations),
        save_every=Duration(epochs=epochs / evaluations),
    )
    if "notebook" in words:  # Adam at one rate, nothing augmented
        config.data.pad_crop, config.data.hflip, config.optim.weight_decay, config.optim.clip_norm = 0, 0.0, 0.0, 0.0
        config.data.crop_scale = config.data.crop_ratio = (1.0, 1.0)
        config.optim.lr = config.optim.min_lr = config.optim.warmup_lr = 3e-3
    return config
