"""Pictures of every form become the same input; the truth is made here with Pillow and NumPy alone."""

from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from evmamba_jax import model_card, preprocess
from evmamba_jax.errors import UserError

CHINA = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"  # 640 x 427


def expected():
    resized = Image.open(CHINA).resize((256 * 640 // 427, 256), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    pixels = np.asarray(resized, np.float64)[16:240, left : left + 224] / 255
    return ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])[None]


@pytest.mark.parametrize(
    "picture",
    [CHINA, str(CHINA), CHINA.read_bytes(), Image.open(CHINA), np.asarray(Image.open(CHINA)), [CHINA]],
    ids=["path", "string", "bytes", "PIL", "array", "list"],
)
@pytest.mark.parametrize("model", ["vim_t", model_card("vim_t")], ids=["name", "card"])
def test_what_the_card_asks_for(picture, model):
    got = preprocess(picture, model)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected(), atol=1e-5)


def test_several_pictures_and_another_size():
    got = preprocess([CHINA, Image.new("L", (50, 90), 128)], "mambavision_l2_512", image_size=96)
    assert got.shape == (2, 96, 96, 3)
    card = model_card("mambavision_l2_512")
    np.testing.assert_allclose(got[1, 50, 50], (128 / 255 - np.array(card.mean)) / card.std, atol=1e-5)


def test_deep_and_grey_arrays():
    grey = np.random.default_rng(0).integers(0, 256, (300, 280), np.uint8)
    got = preprocess(grey, "vim_t")
    np.testing.assert_array_equal(got, preprocess(grey.astype(np.uint16) * 256, "vim_t"))
    np.testing.assert_array_equal(got, preprocess(np.repeat(grey[..., None], 3, 2), "vim_t"))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("absent.jpg", "'absent.jpg' cannot be read: No such file or directory"),
        (b"hello", "a picture of type bytes cannot be read: not an image file"),
        (np.zeros((4, 4, 3)), "an array of float64; uint8 or uint16 is needed"),
        (np.zeros((4, 4, 5), np.uint8), r"an array of shape \(4, 4, 5\); \(height, width, 3\) is needed"),
        (np.zeros((0, 4, 3), np.uint8), r"an array of shape \(0, 4, 3\)"),
        ([], "there are no pictures"),
        (None, "an array of object"),
    ],
)
def test_mistakes(picture, message):
    with pytest.raises(UserError, match=message):
        preprocess(picture, "vim_t")
