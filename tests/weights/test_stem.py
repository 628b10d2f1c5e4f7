"""Weights for RGB images in models for other images: sums and repetitions, as timm's adapt_input_conv makes them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_weights import save_pth, weights_of

from evmamba_jax import create_model
from evmamba_jax.arrays import split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.weights import from_torch

SMALL = {
    "evmamba_t": {"width": 8, "depths": (0, 0, 1, 0), "d_state": 2, "num_classes": 3},
    "vmamba_t": {"width": 8, "depths": (1, 0, 0, 0), "num_classes": 3},
    "vim_t": {"width": 8, "depth": 1, "image_size": 32, "num_classes": 3},
    "mambavision_t": {"width": 8, "depths": (1, 0, 0, 0), "num_classes": 3},
}


def official_stem(state):
    """Return the first kernel of four axes (O, 3, H, W)."""
    return next(name for name, array in state.items() if array.ndim == 4 and array.shape[1] == 3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["official file", "our folder"])
def test_stems_are_adapted_as_timm_adapts_them(name, channels, kind, tmp_path, caplog):
    state = weights_of(abstract_model(name, **SMALL[name]))
    stem = official_stem(state)
    kernel = state[stem]
    if channels == 1:
        expected = kernel.sum(1, keepdims=True)
    else:
        expected = np.tile(kernel, (1, math.ceil(channels / 3), 1, 1))[:, :channels] * np.float32(3 / channels)
    if kind == "official file":
        place = tmp_path / "weights.pth"
        save_pth(place, state)
    else:
        place, model = tmp_path / "folder", abstract_model(name, **SMALL[name])
        from_torch(model, state)
        _, params, batch_stats = split(model)
        meta = {"model": name, "options": SMALL[name]}
        save_model(place, params=params, batch_stats=batch_stats, meta=meta)
    model = create_model(name, pretrained=place, in_channels=channels, **SMALL[name])
    kernels = [array for array in split(model).params.values() if array.ndim == 4 and array.shape[2] == channels]
    found = next(array for array in kernels if array.shape[0] == kernel.shape[2] and array.shape[3] == len(kernel))
    np.testing.assert_allclose(np.asarray(found).transpose(3, 2, 0, 1), expected, rtol=1e-6)
    assert "is for 3 channels: the stem's are" in caplog.text


def test_a_grey_image_gives_the_logits_of_the_same_image_in_rgb(tmp_path):
    options = SMALL["evmamba_t"]
    save_pth(tmp_path / "weights.pth", weights_of(abstract_model("evmamba_t", **options)))
    grey = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 1)), jnp.float32)
    one = create_model("evmamba_t", pretrained=tmp_path / "weights.pth", in_channels=1, **options)
    three = create_model("evmamba_t", pretrained=tmp_path / "weights.pth", **options)
    call = jax.jit(lambda model, images: model(images))
    np.testing.assert_allclose(call(one, grey), call(three, jnp.repeat(grey, 3, -1)), rtol=2e-4, atol=2e-5)


def test_weights_for_other_images_than_rgb_do_not_fit(tmp_path):
    save_pth(tmp_path / "four.pth", weights_of(abstract_model("evmamba_t", in_channels=4, **SMALL["evmamba_t"])))
    with pytest.raises(UserError, match="does not fit model evmamba_t"):
        create_model("evmamba_t", pretrained=tmp_path / "four.pth", in_channels=2, **SMALL["evmamba_t"])


@pytest.mark.parametrize("name", SMALL)
def test_images_that_are_not_normalised_are_refused(name):
    model = abstract_model(name, **SMALL[name])
    with pytest.raises(UserError, match=r"normalised floats, as evmamba_jax\.preprocess makes them; got uint8"):
        jax.eval_shape(lambda images: model(images), jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
