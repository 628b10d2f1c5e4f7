"""Weights from wherever they are kept: a file and the folder that it is converted to give the same."""

import chex
import numpy as np
import pytest
from official_weights import save_pth, weights_of

from evmamba_jax import checkpoints
from evmamba_jax.arrays import split
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.weights import from_torch, load_weights, open_model

SMALL = {
    "evmamba_t": {"width": 8, "depths": (1, 0, 1, 0), "d_state": 2},
    "vmamba_t": {"width": 8, "depths": (1, 0, 1, 0)},
    "msvmamba_n": {"width": 8, "depths": (1, 0, 1, 0)},
    "vim_t": {"width": 8, "depth": 1, "d_state": 2, "image_size": 64},
    "mambavision_t": {"width": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_file_and_a_folder_give_the_same(name, tmp_path):
    model = abstract_model(name, **SMALL[name], num_classes=5)
    official = weights_of(model)
    wrapped = {f"module.{key}": array for key, array in official.items()}
    half = {key: array / 2 for key, array in official.items()}
    save_pth(tmp_path / "file.pth", {"model_ema": half, "model": wrapped, "epoch": 3})

    converted = abstract_model(name, **SMALL[name], num_classes=5)
    from_torch(converted, official)
    _, params, batch_stats = split(converted)
    meta = {"model": name, "options": {**SMALL[name], "num_classes": 5}}
    checkpoints.save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta=meta)

    from_file, from_folder = (load_weights(model, tmp_path / place, name) for place in ("file.pth", "folder"))
    chex.assert_trees_all_equal(from_file[:2], from_folder[:2], (params, batch_stats))
    assert all(isinstance(array, np.ndarray) for array in from_file[0].values())
    assert from_file[2] == {}
    assert split(model).params.keys() == params.keys()  # and the model stays abstract
    assert not any(isinstance(array, np.ndarray) for array in split(model).params.values())

    opened, found, described = open_model(tmp_path / "folder")
    chex.assert_trees_all_equal(split(opened)[1:], split(converted)[1:])
    assert found == name
    assert described["model"] == name


@pytest.mark.parametrize("name", SMALL)
def test_weights_for_other_classes_come_without_their_head_on_request_only(name, tmp_path, caplog):
    model = abstract_model(name, **SMALL[name], num_classes=5)
    official = weights_of(model)
    save_pth(tmp_path / "file.pth", official)
    from_torch(model, official)
    _, params, batch_stats = split(model)
    meta = {"model": name, "options": {**SMALL[name], "num_classes": 5}}
    checkpoints.save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta=meta)
    rest = {path: array for path, array in params.items() if not path.startswith("head.")}
    assert params.keys() - rest.keys() == {"head.kernel", "head.bias"}

    others, headless = (abstract_model(name, **SMALL[name], num_classes=count) for count in (3, 0))
    for place in (tmp_path / "file.pth", tmp_path / "folder"):
        chex.assert_trees_all_equal(load_weights(headless, place, name)[:2], (rest, batch_stats))
        assert not caplog.text
        chex.assert_trees_all_equal(load_weights(others, place, name, fine_tune=True)[:2], (rest, batch_stats))
        assert f"{place} has 5 classes: the head of model {name}, with 3, starts anew" in caplog.text
        caplog.clear()
        with pytest.raises(UserError, match=f"{place.name} has 5 classes and model {name} has 3; the two must be"):
            load_weights(others, place, name)


def test_vims_position_embedding_is_resized_on_request_only(tmp_path):
    save_pth(tmp_path / "file.pth", weights_of(abstract_model("vim_t", **SMALL["vim_t"])))
    other = abstract_model("vim_t", **SMALL["vim_t"] | {"image_size": 32})
    params, _, _ = load_weights(other, tmp_path / "file.pth", "vim_t", fine_tune=True)
    assert params["pos_embed"].shape == (1, 5, 8)
    with pytest.raises(UserError, match="file.pth does not fit model vim_t: .* 'pos_embed' is"):
        load_weights(other, tmp_path / "file.pth", "vim_t")


def test_a_folder_that_names_no_model_needs_a_name(tmp_path):
    model = abstract_model("evmamba_t", **SMALL["evmamba_t"], num_classes=5)
    from_torch(model, weights_of(model))
    _, params, batch_stats = split(model)
    checkpoints.save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta={})
    with pytest.raises(UserError, match="folder does not say which model it is of; name it, e.g. --model evmamba_t"):
        open_model(tmp_path / "folder")
    with pytest.raises(UserError, match="folder has 5 classes and model evmamba_t has 1000; the two must be the same"):
        open_model(tmp_path / "folder", "evmamba_t")
