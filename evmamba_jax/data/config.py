"""What to read and how to augment it, as plain typed fields."""

import dataclasses
import os
from pathlib import Path

from evmamba_jax.data.augment import rand_augment
from evmamba_jax.data.decoding import MAX_PIXELS
from evmamba_jax.errors import UserError


@dataclasses.dataclass
class DataConfig:
    """The input pipeline's settings; on the command line ``--config.data.NAME=VALUE``.

    Tuples are written with commas: ``--config.data.crop_scale=0.5,1.0``.
    """

    # Which images.
    # digits, fashion_mnist_debian, imagenet2012, or any image-classification TFDS name; or your own pictures in a
    # "folder" (also a zip or tar), by a "table" of paths and labels, or saved by Hugging Face's datasets ("hf").
    name: str = "imagenet2012"
    data_dir: str = ""  # where TFDS folders lie; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets. Or your own place
    train_split: str = "train"  # TFDS's slices work too: "train[:90%]"
    eval_split: str = "validation"
    classes: str = ""  # own pictures: a file of the classes, one a line in label order; empty: as found, sorted
    held_out: float = 0.2  # own pictures without a validation or test split: the share that is held out to validate
    on_corrupt: str = "error"  # an unreadable image stops the run ("error") or is passed over and counted ("skip")

    # On the host: encoded record -> uint8 image.
    image_size: int = 224  # side of the square image, pixels
    in_channels: int = 3  # 3 (RGB), 1 (grey), 4 and 2 (with alpha); others are read from NumPy files (.npy)
    exif_orientation: bool = True  # turn a photograph upright as its EXIF data say, to train, evaluate and predict
    max_pixels: int = MAX_PIXELS  # an image of more counts as corrupt
    crop_pct: float = 0.875  # evaluation: side of the crop over the side resized to before, 224 / 256
    crop_mode: str = "center"  # evaluation resizes the short side, or with "squash" both sides
    eval_interpolation: str = "bicubic"  # or "bilinear"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # RandomResizedCrop: range of the area, as a share of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # RandomResizedCrop: range of width / height
    interpolation: str = "bicubic"  # training: "bicubic", "bilinear", or one of the two at "random" for each resizing
    hflip: float = 0.5  # probability of a left-right flip
    auto_augment: str = ""  # e.g. "rand-m9-mstd0.5-inc1", or "evmamba-m9-mstd0.5" with EfficientVMamba's operations
    color_jitter: float = 0.0  # strength for brightness, contrast and saturation; not together with auto_augment
    repeated_aug: int = 1  # differently augmented copies of each image in a row; an epoch then sees fewer images
    num_threads: int = 0  # decoding threads a process; 0: one a core, 16 at most
    num_workers: int = 0  # decoding processes; 0: threads only, which is best on few cores

    # On the device, inside the training step.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # a channel, of images in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    random_erasing: float = 0.25  # probability an image
    mixup: float = 0.2  # alpha of lambda's Beta distribution; 0: no mixup
    cutmix: float = 1.0  # the same for cutmix
    mix_prob: float = 1.0  # probability that images are mixed at all
    switch_prob: float = 0.5  # probability of cutmix where both are on
    mixup_mode: str = "batch"  # lambda and box are drawn for a "batch", each "pair" or each image ("elem")
    mixup_batch: int = 0  # images of that batch, on one GPU in the official runs; 0: all of a step
    label_smoothing: float = 0.1

    def validate(self) -> None:
        """Check every field that the type alone does not keep in range.

        Raises:
            UserError: naming the field, its value and what is allowed.
        """
        self._require("on_corrupt", self.on_corrupt in ("error", "skip"), "'error' or 'skip'")
        self._require("image_size", self.image_size >= 1, "1 or more")
        self._require("in_channels", self.in_channels >= 1, "1 or more")
        self._require(
            "max_pixels", 1 <= self.max_pixels <= 2 * MAX_PIXELS, f"1 to {2 * MAX_PIXELS}, Pillow's own limit"
        )
        self._require("held_out", 0 <= self.held_out < 1, "from 0 (none) to below 1")
        if self.in_channels not in (1, 3):
            for field in ("auto_augment", "color_jitter"):
                self._require(field, not getattr(self, field), "off where images are neither grey nor RGB")
        self._require("crop_pct", 0 < self.crop_pct <= 1, "above 0, up to 1")
        self._require("crop_mode", self.crop_mode in ("center", "squash"), "'center' or 'squash'")
        resizing = ("bicubic", "bilinear")
        self._require("eval_interpolation", self.eval_interpolation in resizing, "'bicubic' or 'bilinear'")
        self._require("interpolation", self.interpolation in (*resizing, "random"), "'bicubic', 'bilinear' or 'random'")
        for field, least, most in (("crop_scale", 0.0, 1.0), ("crop_ratio", 0.0, float("inf"))):
            value = getattr(self, field)
            ok = len(value) == 2 and least < value[0] <= value[1] <= most
            self._require(field, ok, f"two numbers, lower first, above {least:g}" + (" up to 1" if most == 1 else ""))
        for field in ("mean", "std"):
            value = getattr(self, field)
            self._require(field, len(value) == self.in_channels, f"in_channels={self.in_channels} numbers")
        self._require("std", all(value > 0 for value in self.std), "numbers above 0")
        if self.auto_augment:
            rand_augment(self.auto_augment)
            self._require("color_jitter", self.color_jitter == 0, "0 where auto_augment is set, as timm has it")
        self._require("repeated_aug", self.repeated_aug >= 1, "1 (off) or more")
        for field in ("num_threads", "num_workers", "color_jitter", "mixup", "cutmix", "mixup_batch"):
            self._require(field, getattr(self, field) >= 0, "0 or more")
        for field in ("hflip", "random_erasing", "mix_prob", "switch_prob"):
            self._require(field, 0 <= getattr(self, field) <= 1, "a probability, 0 to 1")
        self._require("mixup_mode", self.mixup_mode in ("batch", "pair", "elem"), "'batch', 'pair' or 'elem'")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1")

    def _require(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"data.{field}={getattr(self, field)!r} is not allowed: it must be {allowed}")


def resolve_data_dir(data_dir: str) -> Path:
    """Return the folder that holds the TFDS folders.

    Args:
        data_dir: a folder, or "" for TFDS's own default.

    Returns:
        ``data_dir``, else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()
