"""Effective receptive fields, against closed forms, finite differences and slow loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evmamba_jax.analysis import area_shares, effective_receptive_field
from evmamba_jax.analysis.receptive_field import SHARES, main
from evmamba_jax.arrays import fill, merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model

BOX = """
import jax

def box(images):
    return jax.lax.reduce_window(images, 0.0, jax.lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "valid")

def shrinks(images):
    return images.mean((1, 2))

def fails(images):
    return images @ images
"""


def valid(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_two_convolutions_have_the_field_of_their_product():
    """Of a linear map, the gradient of the middle is the kernel: here the two kernels, one spread over the other."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 3, 3, 4)), rng.normal(size=(3, 3, 4, 5))
    images = rng.normal(size=(5, 9, 12, 3))
    together = np.zeros((5, 5, 3, 5))
    for i, j, k, m in np.ndindex(3, 3, 3, 3):
        together[i + k, j + m] += first[i, j] @ second[k, m]
    wanted = np.zeros((9, 12))
    for image in images:
        # The map is 5x8, its middle (2, 4), which sees rows 2 to 6 and columns 4 to 8.
        channels = np.einsum("ijc,ijco->o", image[2:7, 4:9], together)
        assert 0 < (channels > 0).sum() < 5
        wanted[2:7, 4:9] += np.maximum(together[..., channels > 0].sum(-1), 0).sum(-1) / 5
    with jax.enable_x64(True):
        field = effective_receptive_field(lambda x: valid(valid(x, first), second), images, batch_size=2)
    np.testing.assert_allclose(field.map, wanted, rtol=1e-10, atol=1e-12)
    assert field[2:] == (0, 5, 0)
    assert field.area_shares == slow_shares(wanted, SHARES)


def slow_shares(gradient, shares):
    found = {}
    height, width = gradient.shape
    for share in shares:
        for reach in range(max(height, width)):
            inside = [
                (y, x)
                for y in range(height)
                for x in range(width)
                if abs(y - height // 2) <= reach and abs(x - width // 2) <= reach
            ]
            if sum(gradient[place] for place in inside) >= share * gradient.sum():
                found[share] = len(inside) / gradient.size
                break
    return found


@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (5, 12), (9, 4)])
def test_areas_are_those_of_the_smallest_squares(shape):
    gradient = np.random.default_rng(1).exponential(size=shape)
    shares = (0.01, 0.2, 0.3, 0.5, 0.8, 0.99)
    assert area_shares(gradient, shares) == slow_shares(gradient, shares)
    alone = np.zeros(shape)
    alone[shape[0] // 2, shape[1] // 2] = 3
    assert area_shares(alone) == dict.fromkeys(SHARES, 1 / alone.size)
    corner = np.zeros(shape)
    corner[0, 0] = 3
    assert area_shares(corner)[0.99] == slow_shares(corner, [0.99])[0.99] > 0.5


MODELS = {
    "vmamba_t": ({"width": 8, "depths": (0, 0, 1, 1)}, 2),
    "vim_t": ({"width": 8, "depth": 3, "image_size": (12, 16), "patch_size": 4, "d_state": 2}, -1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_field_that_finite_differences_find(name):
    options, stage = MODELS[name]
    model, rng = abstract_model(name, in_channels=1, num_classes=0, **options), np.random.default_rng(2)
    graphdef, params, stats = split(model)
    params = {path: 0.4 * rng.normal(size=array.shape) for path, array in params.items()}
    images = rng.normal(size=(2, 12, 16, 1))
    with jax.enable_x64(True):

        @jax.jit
        def middles(params, images):
            x = merge(graphdef, params, stats).features(images)[stage]
            return jnp.maximum(x[:, x.shape[1] // 2, x.shape[2] // 2], 0).sum(-1)

        wanted = np.zeros((12, 16))
        steps = 1e-6 * np.eye(12 * 16).reshape(-1, 12, 16, 1)
        for image in images:
            more, less = np.split(np.asarray(middles(params, np.concatenate([image + steps, image - steps]))), 2)
            wanted += np.maximum((more - less) / 2e-6, 0).reshape(12, 16) / 2
        fill(model, params, stats)
        field = effective_receptive_field(model, (image for image in images), stage=stage)
    assert wanted.max() > 0.1
    np.testing.assert_allclose(field.map, wanted, rtol=0, atol=1e-7 * wanted.max())
    assert field.stage == stage % 4


def test_images_without_a_number_are_left_out_and_counted():
    images = np.ones((5, 6, 6, 3), np.float32)
    images[1, 0, 0] = np.nan  # far from the middle, whose value it spoils
    images[3] = 1e30  # whose square overflows

    def square_times_mean(x):
        return x**2 * x.mean((1, 2, 3), keepdims=True)

    field = effective_receptive_field(square_times_mean, images)
    assert (field.images, field.skipped) == (3, 2)
    alone = effective_receptive_field(square_times_mean, images[:1])
    np.testing.assert_allclose(field.map, alone.map)
    with pytest.raises(UserError, match=r"^the gradient of every image \(2\) is no number"):
        effective_receptive_field(square_times_mean, images[[1, 3]])


def small():
    return abstract_model("evmamba_t", width=8, depths=(0, 0, 0, 0), num_classes=0)


FLOATS = np.ones((1, 6, 6, 3), np.float32)


@pytest.mark.parametrize(
    ("model", "images", "options", "told"),
    [
        (jnp.sin, FLOATS, {"stage": 1}, "there is no stage 1; allowed: 0 to 0, or -1 for the last"),
        (small, FLOATS, {"stage": -5}, "there is no stage -5; allowed: 0 to 3, or -1 for the last"),
        (small, FLOATS[:, :3], {}, "image size 3x6 is too small: height and width must be at least 4"),
        (jnp.sin, FLOATS[:0], {}, "there are no images: give at least one"),
        (jnp.sin, FLOATS, {"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        (jnp.sin, FLOATS.astype(np.uint8), {}, "images must be normalised floats .* got uint8 of shape"),
        (
            jnp.sin,
            [FLOATS[0], FLOATS[0, :5]],
            {},
            r"all of one shape; got float32 of shape \(5, 6, 3\) after \(6",
        ),
        (jnp.mean, FLOATS, {}, r"mean gives shape \(\) for images of shape \(1, 6, 6, 3\); a map \(1, height"),
        (jnp.zeros_like, FLOATS, {}, "no gradient reaches the images"),
        (7, FLOATS, {}, r"int gives no maps: take a model with features\(images\), or a function of images"),
        (jnp.linalg.inv, FLOATS, {}, r"inv fails on images of shape \(1, 6, 6, 3\): ValueError: "),
    ],
)
def test_what_cannot_be_is_refused(model, images, options, told):
    with pytest.raises(UserError, match=told) as caught:
        effective_receptive_field(model() if model is small else model, images, **options)
    assert "\n" not in str(caught.value)


def test_functions_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(BOX)
    command = ["own.py:box", "own.py:box", "--count", "8", "--size", "20", "--json", "shares.json"]
    assert main([*command, "--noise"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "8 images of noise"
    assert said[2].split() == ["own.py:box", "stage", "0,", "20", "px", "2.2%", "2.2%", "6.2%", "6.2%"]
    with Image.open("receptive_field.png") as picture:
        assert picture.width > 1.5 * picture.height
    # A box of 5x5: 3x3 pixels hold 36 %.
    areas = {"0.2": 9 / 400, "0.3": 9 / 400, "0.5": 25 / 400, "0.99": 25 / 400}
    entry = {"model": "own.py:box", "stage": 0, "image_size": 20, "images": 8, "skipped": 0, "of": "noise"}
    assert json.loads((tmp_path / "shares.json").read_text()) == [entry | {"area_shares": areas}] * 2

    assert main([*command, "--out", "photographs.png"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 pictures for 8 images: the others are random crops of them, the same in every run"
    assert json.loads((tmp_path / "shares.json").read_text())[1]["of"] == "pictures"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["none.py:box"], "there is no file none.py, which none.py:box names"),
        (["own.py:bx"], "own.py has no function bx, did you mean 'box'?"),
        (["broken.py:box"], "broken.py cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        (["own.py:shrinks"], "shrinks gives shape (1, 3) for images of shape (1, 32, 32, 3); a map (1, height, "),
        (["own.py:fails"], "fails fails on images of shape (1, 32, 32, 3): TypeError: "),
        (["own.py:box", "--stage", "3"], "there is no stage 3; allowed: 0 to 0, or -1 for the last"),
        (["own.py:box", "--count", "0"], "--count is 0; it must be 1 or more"),
        (["own.py:box", "--images", "empty"], "there are no images in the folder empty"),
        (["own.py:box", "--images", "own.py"], "no image can be read: name others with --images, or take --noise"),
        (["own.py:box", "--images", "own.py", "--noise"], "--noise takes no pictures: leave --images out, or --noise"),
        (["vnamba_t"], "'vnamba_t' is neither a model nor a place of weights, did you mean 'vmamba_t'?"),
        (["own.py:box", "--out", "field.jpg"], "argument --out: field.jpg must end in .png"),
    ],
)
def test_a_mistake_is_one_line(command, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(BOX)
    (tmp_path / "broken.py").write_text("import not_there\n")
    (tmp_path / "empty").mkdir()
    size = [] if command == ["vnamba_t"] else ["--size", "32"]
    assert main([*command, *size]) == 2
    assert f"error: {told}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
