"""Host transforms against Pillow, against torchvision's rules worked out by hand, and against a slow simulation."""

import hashlib
import io
import math

import chex
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError, decode
from evmamba_jax.data.transforms import eval_image, random_crop_box, train_image, train_view


def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return load_sample_image("china.jpg")  # (427, 640, 3)


class ScriptedRng:
    """Stands in for a Generator and returns what the test wrote down."""

    def __init__(self, uniforms, integers=()):
        self._uniforms, self._integers, self.bounds = iter(uniforms), iter(integers), []

    def uniform(self, low, high):
        return low + (high - low) * next(self._uniforms)

    def integers(self, bound):
        self.bounds.append(bound)
        return next(self._integers)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("JPEG", {"mode": "L"}),
        ("JPEG", {"mode": "CMYK"}),
        ("PNG", {}),
        ("PNG", {"mode": "RGBA"}),
        ("PNG", {"mode": "P"}),
        ("PNG", {"mode": "L"}),
        ("BMP", {}),
    ],
)
def test_decode_gives_pillows_pixels(photo, kind, options):
    data = encode(photo, kind, **options)
    got = decode(data, 3)
    chex.assert_shape(got, (427, 640, 3))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    # CMYK has no exact conversion; everything else is equal to the bit.
    chex.assert_trees_all_close(got.astype(int), expected.astype(int), atol=1 if options.get("mode") == "CMYK" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_to_grey(photo, kind):
    grey, colour = encode(photo, kind, mode="L"), encode(photo, kind)
    expected = np.asarray(Image.open(io.BytesIO(grey)))[..., None]
    np.testing.assert_array_equal(decode(grey, 1), expected)
    # From a colour JPEG the decoder's luma plane is taken, which skips the clipping on the way through RGB.
    expected = np.asarray(Image.open(io.BytesIO(colour)).convert("L"))[..., None]
    difference = np.abs(decode(colour, 1).astype(int) - expected)
    assert difference.mean() < (0.5 if kind == "JPEG" else 1e-9)


def test_decode_reads_jpegs_with_rubbish_after_the_end(photo):
    data = encode(photo, "JPEG")
    np.testing.assert_array_equal(decode(data + b"rubbish", 3), decode(data, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0, 2, 100, -1000])
def test_truncated_images_are_corrupt(photo, kind, keep):
    data = encode(photo, kind)
    with pytest.raises(CorruptImageError, match=r"\w"):
        decode(data[:keep], 3)


def test_crop_takes_the_drawn_box():
    # Area 0.25 * 40000 = 10000, aspect exp(0) = 1: a 100 x 100 box, which leaves 101 places each way.
    rng = ScriptedRng([0.25, 0.5], [7, 11])
    assert random_crop_box(rng, 200, 200, (0.0, 1.0), (0.5, 2.0)) == (7, 11, 100, 100)
    assert rng.bounds == [101, 101]


def test_crop_tries_again_until_a_box_fits():
    # First try: area 20000, aspect 4/3 on a 100 x 200 image is 163 x 122, too high. Second: 10000 of aspect 1.
    rng = ScriptedRng([1.0, 1.0, 0.5, 0.5], [0, 30])
    assert random_crop_box(rng, 100, 200, (0.0, 1.0), (3 / 4, 4 / 3)) == (0, 30, 100, 100)


def test_crop_aspect_is_width_by_height():
    rng = ScriptedRng([0.16, 1.0], [0, 0])
    assert random_crop_box(rng, 100, 100, (0.0, 1.0), (0.25, 4.0)) == (0, 0, 20, 80)  # area 1600, aspect 4


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((10, 100), (0, 43, 10, 13)),  # too wide: full height, width round(10 * 4/3) = 13, centred
        ((100, 10), (43, 0, 13, 10)),  # too high: full width, height round(10 / (3/4)) = 13
        ((30, 36), (0, 0, 30, 36)),  # fits the range already: everything
        ((1, 50), (0, 24, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_crop_falls_back_to_the_centre(size, box):
    draws = [100.0, 0.5] * 10  # a hundred times the image's area never fits
    assert random_crop_box(ScriptedRng(draws), *size, (0.0, 1.0), (3 / 4, 4 / 3)) == box


def slow_crop(height, width, scale, ratio):
    """torchvision's rule in its own words, with Python's generator: rejection loop, then central crop."""
    import random

    for _ in range(10):
        target = random.uniform(*scale) * height * width
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if w <= width and h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_crop_distribution():
    """Area, aspect and place have the distribution of a slow simulation (two-sample Kolmogorov-Smirnov)."""
    import random

    random.seed(0)
    settings = (375, 500, (0.08, 1.0), (3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    ours = np.array([random_crop_box(rng, *settings) for _ in range(4000)])
    slow = np.array([slow_crop(*settings) for _ in range(4000)])
    top, left, height, width = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    for what in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(what(ours), what(slow)).pvalue > 1e-3


def test_train_image_is_crop_resize_flip(photo):
    """The same box taken with Pillow's own crop and resize, flipped by Pillow."""
    data = encode(photo)
    box_rng, rng = np.random.default_rng(5), np.random.default_rng(5)
    top, left, height, width = random_crop_box(box_rng, 427, 640, (0.08, 1.0), (3 / 4, 4 / 3))
    crop = (
        Image.fromarray(photo).crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BICUBIC)
    )
    config = DataConfig(image_size=64, crop_pct=1.0, hflip=1.0)
    expected = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    np.testing.assert_array_equal(train_image(data, config, rng), expected)
    config.hflip = 0.0
    np.testing.assert_array_equal(train_image(data, config, np.random.default_rng(5)), np.asarray(crop))


def slow_pad_crop(pixels, pad, top, left):
    """Return the crop at (top, left) of an image in a frame of zeros, as large as the image, pixel by pixel."""
    height, width = pixels.shape[:2]
    crop = np.zeros_like(pixels)
    for row, column in np.ndindex(height, width):
        r, c = row + top - pad, column + left - pad
        if 0 <= r < height and 0 <= c < width:
            crop[row, column] = pixels[r, c]
    return crop


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(6, 6), (9, 5)])
def test_padded_crops_are_those_of_a_slow_loop_each_as_often(size, channels):
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (*size, channels), dtype=np.uint8)
    config = DataConfig(
        **{"image_size": 6, "pad_crop": 2, "in_channels": channels, "hflip": 0.5},
        **{"mean": (0.5,) * channels, "std": (0.5,) * channels},
    )
    config.validate()
    parts = [Image.fromarray(pixels[..., k]).resize((6, 6), Image.Resampling.BICUBIC) for k in range(channels)]
    whole = np.stack([np.asarray(part) for part in parts], axis=-1)
    crops = {(top, left): slow_pad_crop(whole, 2, top, left) for top in range(5) for left in range(5)}
    places = {way(crop).tobytes(): place for place, crop in crops.items() for way in (np.asarray, np.fliplr)}
    assert len(places) == 50
    drawn = [places[train_view(pixels, config, rng).tobytes()] for _ in range(1000)]
    counts = [drawn.count(place) for place in crops]
    assert stats.chisquare(counts).pvalue > 1e-3
    first, second = (train_view(pixels, config, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_flip_probability():
    pixels = np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1))
    data = encode(pixels)
    config = DataConfig(
        image_size=8, crop_pct=1.0, in_channels=1, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.3
    )
    rng = np.random.default_rng(0)
    flipped = [bool(train_image(data, config, rng)[0, 0, 0] > 0) for _ in range(2000)]
    assert 0.27 < np.mean(flipped) < 0.33


def test_train_image_golden(photo):
    """The pixels of a given generator never change: a run can be repeated years later."""
    config = DataConfig(image_size=32, crop_pct=1.0)
    data, rng = encode(photo), np.random.default_rng(0)
    images = np.stack([train_image(data, config, rng) for _ in range(8)])
    chex.assert_shape(images, (8, 32, 32, 3))
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "43f059e1449282dd"


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (40, 48), (224, 224), (300, 31)])
@pytest.mark.parametrize("channels", [1, 3])
def test_eval_image(photo, size, channels):
    height, width = size
    image = Image.fromarray(photo).crop((0, 0, width, height)).convert("L" if channels == 1 else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    # torchvision's Resize(256): the long side is truncated; CenterCrop(224): half the margin, rounded to even.
    new = (256, int(256 * height / width)) if width < height else (int(256 * width / height), 256)
    resized = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - 224) / 2.0), round((new[1] - 224) / 2.0)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))).reshape(224, 224, channels)
    config = DataConfig(in_channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    np.testing.assert_array_equal(eval_image(buffer.getvalue(), config), expected)
