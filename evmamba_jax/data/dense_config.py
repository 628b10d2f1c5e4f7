"""What to read for label maps and for boxes, and how to augment it: fields beside those of all data."""

import dataclasses

from evmamba_jax.data.config import DataConfig
from evmamba_jax.ranges import chosen, ranged, stated


def _two_sides(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(n, int) and n >= 32 for n in value)


@dataclasses.dataclass
class DenseData(DataConfig):
    """What label maps and boxes share; the fields for images of one class are off."""

    # digit_scenes, which needs no files; coco and ade20k as prepared; or your own by the name it was prepared with.
    name: str = "coco"
    # Limits of the longer and the shorter side, to which an image is resized with its ratio kept, pixels.
    scale: tuple[int, int] = stated((1333, 800), "two whole numbers of at least 32", _two_sides)
    # Evaluation: every image with the padding that the official test gives it, a program for each size, an image a
    # device; or images of "buckets" of a few sizes, batch_size at a time, padded with zeros to the bucket.
    eval_padding: str = chosen("exact", ("exact", "buckets"))

    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclasses.dataclass
class SegmentationData(DenseData):
    """Images with label maps; the defaults are mmseg's for ADE20K.

    ``image_size`` is the side of the square crop for training, and of the windows of a "slide" test.
    """

    name: str = "ade20k"
    image_size: int = 512
    scale: tuple[int, int] = (2048, 512)
    scale_range: tuple[float, float] = ranged((0.5, 2.0), above=0)  # training: factors of scale, drawn evenly
    # Training: a crop is drawn anew, ten times at most, while one class has this share of its counted pixels or more.
    most_of_a_class: float = ranged(0.75, above=0, most=1)
    photometric: bool = True  # training: brightness, contrast, saturation and hue change
    test: str = chosen("whole", ("whole", "slide"))
    test_stride: int = ranged(341, least=1)  # between the windows of a "slide" test, pixels
    # Evaluate at several scales: the image as it is stored times each of these, e.g. .5, .75, 1, 1.25, 1.5 and 1.75,
    # and its mirror image; probabilities are averaged. Empty: at ``scale`` alone.
    test_scales: tuple[float, ...] = ranged((), above=0)


@dataclasses.dataclass
class DetectionData(DenseData):
    """Images with boxes; the defaults are mmdet's for COCO."""

    # Training: "one_scale"; "multi_scale", short sides of 480 to 800, half of the images cropped before (mmdet's 3x);
    # or "large_scale_jitter", Detectron2's pipeline for Vim: images are made to fit a square of scale's side times 0.1
    # to 2, and cropped to it. With that images are resized with antialiasing, for evaluation too.
    augment: str = chosen("one_scale", ("one_scale", "multi_scale", "large_scale_jitter"))
    max_objects: int = ranged(100, least=1)  # of an image; one with more is refused before training
