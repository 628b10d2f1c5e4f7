"""What to read and how to augment it, as plain typed fields."""

import dataclasses
import os
from pathlib import Path

from evmamba_jax import ranges
from evmamba_jax.data.augment import rand_augment
from evmamba_jax.data.decoding import MAX_PIXELS
from evmamba_jax.errors import UserError
from evmamba_jax.ranges import chosen, free, place, ranged, share, stated
from evmamba_jax.storage import local

_RESIZING = ("bicubic", "bilinear")


@dataclasses.dataclass
class DataConfig:
    """The input pipeline's settings; on the command line ``--config.data.NAME=VALUE``.

    Tuples are written with commas: ``--config.data.crop_scale=0.5,1.0``.
    """

    # Which images: digits, fashion_mnist_debian, stamps, imagenet2012, or any image-classification TFDS name; or your
    # own pictures in a "folder" (also a zip or tar), by a "table" of paths and labels, or saved by Hugging Face's
    # datasets ("hf").
    name: str = stated("imagenet2012", "a name", lambda name: isinstance(name, str) and bool(name.strip()))
    # Where TFDS folders lie; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets. Or the place of your own pictures.
    data_dir: str = place("")
    train_split: str = free("train")  # TFDS's slices work too: "train[:90%]"
    eval_split: str = free("validation")
    # Own pictures: a file of the classes, one a line in label order; empty: as found, sorted.
    classes: str = place("")
    # Own pictures without a validation or test split: the share that is held out to validate.
    held_out: float = ranged(0.2, least=0, below=1)
    # Draw classes equally often, and any image of the class then, in place of every image once an epoch.
    balanced: bool = False
    # An unreadable image stops the run ("error") or is passed over and counted ("skip").
    on_corrupt: str = chosen("error", ("error", "skip"))

    # On the host: encoded record -> uint8 image.
    image_size: int = ranged(224, least=1)  # side of the square image, pixels
    # 3 (RGB), 1 (grey), 4 and 2 (with alpha); others are read from NumPy files (.npy).
    in_channels: int = ranged(3, least=1)
    # Turn a photograph upright as its EXIF data say, to train, evaluate and predict.
    exif_orientation: bool = free(True)
    # An image of more counts as corrupt; Pillow reads none of more than twice the default.
    max_pixels: int = ranged(MAX_PIXELS, least=1, most=2 * MAX_PIXELS)
    # Evaluation: side of the crop over the side resized to before, 224 / 256.
    crop_pct: float = ranged(0.875, above=0, most=1)
    # Evaluation resizes the short side, or with "squash" both sides.
    crop_mode: str = chosen("center", ("center", "squash"))
    eval_interpolation: str = chosen("bicubic", _RESIZING)
    # RandomResizedCrop: range of the area, as a share of the image.
    crop_scale: tuple[float, float] = ranged((0.08, 1.0), above=0, most=1)
    crop_ratio: tuple[float, float] = ranged((3 / 4, 4 / 3), above=0)  # RandomResizedCrop: range of width / height
    # In its place: a crop of image_size from the image, resized to that, with this many zeros on each side; 0: off.
    pad_crop: int = ranged(0, least=0)
    interpolation: str = chosen("bicubic", (*_RESIZING, "random"))  # training; "random": one of the two each time
    hflip: float = share(0.5)  # probability of a left-right flip
    # E.g. "rand-m9-mstd0.5-inc1", or "evmamba-m9-mstd0.5" with EfficientVMamba's operations.
    auto_augment: str = free("")
    # Strength for brightness, contrast and saturation; not together with auto_augment.
    color_jitter: float = ranged(0.0, least=0)
    # Differently augmented copies of each image in a row; an epoch then sees fewer images.
    repeated_aug: int = ranged(1, least=1, words="1 (off) or more")
    num_threads: int = ranged(0, least=0)  # decoding threads a process; 0: one a core, 16 at most
    num_workers: int = ranged(0, least=0)  # decoding processes; 0: threads only, which is best on few cores

    # On the device, inside the training step.
    mean: tuple[float, ...] = ranged((0.485, 0.456, 0.406), least=0, most=1)  # a channel, of images in [0, 1]
    std: tuple[float, ...] = ranged((0.229, 0.224, 0.225), above=0)
    random_erasing: float = share(0.25)  # probability an image
    mixup: float = ranged(0.2, least=0)  # alpha of lambda's Beta distribution; 0: no mixup
    cutmix: float = ranged(1.0, least=0)  # the same for cutmix
    # Probability that images are mixed at all.
    mix_prob: float = share(1.0)
    # Probability of cutmix where both are on.
    switch_prob: float = share(0.5)
    # Lambda and box are drawn for a "batch", each "pair" or each image ("elem").
    mixup_mode: str = chosen("batch", ("batch", "pair", "elem"))
    mixup_batch: int = ranged(0, least=0)  # images of that batch, on one GPU in the official runs; 0: all of a step
    label_smoothing: float = ranged(0.1, least=0, below=1)

    def validate(self) -> None:
        """Check the range of every field, and what they must have in common.

        Raises:
            UserError: naming the field, its value and what is allowed.
        """
        ranges.check(self, "data.")
        for field in ("crop_scale", "crop_ratio"):
            first, second = getattr(self, field)
            self._require(field, first <= second, "two numbers, the lower first")
            own = not self.pad_crop or (first, second) == getattr(type(self), field)
            self._require(field, own, f"left alone where pad_crop={self.pad_crop} replaces RandomResizedCrop")
        self._require("pad_crop", self.pad_crop < self.image_size, f"below image_size={self.image_size}")
        for field in ("mean", "std"):
            value = getattr(self, field)
            self._require(field, len(value) == self.in_channels, f"in_channels={self.in_channels} numbers")
        if self.in_channels not in (1, 3):
            for field in ("auto_augment", "color_jitter"):
                self._require(field, not getattr(self, field), "off where images are neither grey nor RGB")
        if self.auto_augment:
            rand_augment(self.auto_augment)
            self._require("color_jitter", self.color_jitter == 0, "0 where auto_augment is set, as timm has it")

    def _require(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"data.{field}={getattr(self, field)!r} is not allowed: it must be {allowed}")


def resolve_data_dir(data_dir: str) -> Path:
    """Return the folder that holds the TFDS folders.

    Args:
        data_dir: a folder, or "" for TFDS's own default.

    Returns:
        ``data_dir``, else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
        UserError: as ``storage.local``.
    """
    return local(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
