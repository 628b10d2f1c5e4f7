"""Pixels of every mode and depth, turned upright, within limits; the truth is the array that was saved, or Pillow."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError, decode, looks_like_image
from evmamba_jax.data.transforms import eval_crop, eval_image, train_image

COLOURS = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
GREYS = COLOURS[..., 0]


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def numpy_file(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_highest_eight(kind):
    deep = GREYS.astype(np.uint16) * 256 + 77
    data = saved(deep, kind)
    np.testing.assert_array_equal(decode(data, 1)[..., 0], GREYS)
    np.testing.assert_array_equal(decode(data, 3), np.repeat(GREYS[..., None], 3, 2))


def test_dark_pictures_of_sixteen_bits_stay_dark():
    dark = np.full((4, 4), 200, np.uint16)  # of 65535
    assert decode(saved(dark), 1).max() == 0
    assert decode(saved(dark, "PPM"), 1).max() == 0


def test_floats_from_zero_to_one_and_integers_of_32_bits():
    np.testing.assert_array_equal(decode(saved(GREYS.astype(np.float32) / 255, "TIFF"), 1)[..., 0], GREYS)
    np.testing.assert_array_equal(decode(saved(GREYS.astype(np.int32), "TIFF"), 1)[..., 0], GREYS)
    wild = np.array([[np.nan, -3, 0.5, 1]], np.float32)
    np.testing.assert_array_equal(decode(saved(wild, "TIFF"), 1)[0, :, 0], [0, 0, 128, 255])


def test_what_is_transparent_is_white():
    alpha = np.zeros((7, 9, 1), np.uint8)
    alpha[2:] = 255
    for image in (np.concatenate([COLOURS, alpha], 2), np.concatenate([GREYS[..., None], alpha], 2)):
        got = decode(saved(image), 3)
        assert (got[:2] == 255).all()
        np.testing.assert_array_equal(got[2:], np.broadcast_to(image[2:, :, :-1], (5, 9, 3)))
    palette = Image.fromarray(GREYS % 4).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 20, 20, 20, 30, 30, 30])
    got = decode(saved(palette, transparency=3), 1)[..., 0]
    assert (got[GREYS % 4 == 3] == 255).all()
    assert (got[GREYS % 4 == 1] == 9).all()


def test_other_modes():
    np.testing.assert_array_equal(decode(saved(GREYS > 99), 1)[..., 0], (GREYS > 99) * 255)
    lab = Image.new("LAB", (4, 4), (255, 128, 128))
    assert (decode(saved(lab, "TIFF"), 3) >= 253).all()
    first, second = Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)
    moving = saved(first, save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(moving, 3), COLOURS)


def test_four_channels_are_colour_and_alpha_and_others_come_from_numpy():
    rgba = np.concatenate([COLOURS, GREYS[..., None]], 2)
    np.testing.assert_array_equal(decode(saved(rgba), 4), rgba)
    many = np.random.default_rng(1).integers(0, 256, (5, 6, 7), np.uint8)
    np.testing.assert_array_equal(decode(numpy_file(many), 7), many)
    np.testing.assert_array_equal(decode(numpy_file(many.astype(np.uint16) * 256 + 9), 7), many)
    np.testing.assert_array_equal(decode(numpy_file(GREYS), 1)[..., 0], GREYS)
    with pytest.raises(CorruptImageError, match=r"\(5, 6, 7\).*\(height, width, 3\)"):
        decode(numpy_file(many), 3)
    with pytest.raises(CorruptImageError, match="7 channels"):
        decode(saved(COLOURS), 7)


def test_views_of_many_channels_treat_all_alike():
    many = np.random.default_rng(1).integers(0, 256, (40, 60, 5), np.uint8)
    config = DataConfig(in_channels=5, image_size=16, mean=(0.5,) * 5, std=(0.5,) * 5)
    grey = DataConfig(in_channels=1, image_size=16, mean=(0.5,), std=(0.5,))
    for k in (0, 4):
        one = numpy_file(many[..., k])
        np.testing.assert_array_equal(eval_image(numpy_file(many), config)[..., k], eval_image(one, grey)[..., 0])
        whole, alone = numpy_file(many), train_image(one, grey, np.random.default_rng(3))
        np.testing.assert_array_equal(train_image(whole, config, np.random.default_rng(3))[..., k], alone[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photographs_are_turned_as_pillow_turns_them(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(COLOURS).resize((40, 24)), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        plain = np.asarray(image)
    np.testing.assert_array_equal(decode(data, 3, upright=True), expected)
    np.testing.assert_array_equal(decode(data, 3), plain)
    assert decode(data, 3, upright=True).flags.c_contiguous


def test_damaged_exif_data_turn_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(COLOURS, "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    np.testing.assert_array_equal(decode(data[:at] + b"XXXX" + data[at + 4 :], 3, upright=True), decode(data, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_of_too_many_pixels_is_refused_unread(kind):
    data = saved(Image.fromarray(COLOURS).resize((90, 70)), kind)
    assert decode(data, 3, max_pixels=6300).shape == (70, 90, 3)
    with pytest.raises(CorruptImageError, match=r"90 x 70 pixels are more than the 6299 that data\.max_pixels allows"):
        decode(data[:-99], 3, max_pixels=6299)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (3, 40_000), (40_000, 3)])
def test_extreme_shapes_are_cropped_before_they_are_resized(shape):
    """Resized whole, the first would have 256 x 15 million pixels. A smooth ramp tells where the middle comes from."""
    long = max(shape)
    ramp = np.broadcast_to(np.linspace(0, 255, long).astype(np.uint8), (min(shape), long))
    pixels = np.ascontiguousarray((ramp if shape[1] == long else ramp.T)[..., None].repeat(3, 2))
    config = DataConfig(image_size=224)
    view = eval_crop(pixels, config)
    assert view.shape == (224, 224, 3)
    assert abs(view.astype(int) - 127).max() <= 1
    assert train_image(saved(pixels), config, np.random.default_rng(0)).shape == (224, 224, 3)


@pytest.mark.parametrize("shape", [(20, 200), (200, 20), (33, 170)])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
def test_cropping_first_gives_the_pixels_of_resizing_first(shape, filter_, monkeypatch):
    # Pillow decides by the shape which axis comes first, and clips between: of a smooth picture nothing is clipped.
    image = Image.fromarray(np.random.default_rng(0).integers(60, 190, (5, 5, 3), np.uint8))
    pixels = np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))
    config = DataConfig(image_size=14, eval_interpolation=filter_)
    monkeypatch.setattr("evmamba_jax.data.transforms._EXTREME", 2)
    cropped_first = eval_crop(pixels, config)
    monkeypatch.setattr("evmamba_jax.data.transforms._EXTREME", 1000)
    difference = np.abs(cropped_first.astype(int) - eval_crop(pixels, config))
    assert difference.max() <= 1
    assert cropped_first.std() > 10


def test_images_are_told_by_their_first_bytes():
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        assert looks_like_image(saved(COLOURS, kind)[:4096]), kind
    for text in (b"", b"hello", b"PK\x03\x04", b"BM is how a text begins", b"P1 is a title", b"%PDF-1.4"):
        assert not looks_like_image(text), text
