"""The course project's model: sizes, initial values, dropout, its place among the models. Parity: tests/experiments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_weights import weights_of

from evmamba_jax import create_model, list_models, model_card
from evmamba_jax.analysis import count_flops, count_parameters
from evmamba_jax.analysis.__main__ import main as analyse
from evmamba_jax.arrays import split
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.models.__main__ import main as print_cards
from evmamba_jax.weights import from_torch, to_torch

SMALL = {"width": 8, "depth": 2, "d_state": 2, "dt_rank": 3, "patch_size": 2}
KINDS = ({}, {"squeeze_excite": 4}, {"local": "inverted_residual"})


@pytest.mark.parametrize(("kind", "parameters"), [(0, 596_362), (1, 642_442), (2, 1_942_282)])
def test_it_has_as_many_parameters_as_the_notebooks_print(kind, parameters):
    assert count_parameters(abstract_model("course_vim", **KINDS[kind])) == parameters


def test_the_deep_one_sees_four_tokens():
    model = abstract_model("course_vim_deep")
    maps = jax.eval_shape(lambda model, x: model.features(x), model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert [stage.shape for stage in maps] == [(1, 2, 2, 256)] * 4


def test_layers_start_as_pytorchs():
    _, params, _ = split(create_model("course_vim", depth=1))
    for name, fan_in in (
        *(("patch_embed", 48), ("head", 96), ("blocks.0.mixer.proj", 96), ("blocks.0.mixer.conv2", 96)),
        *(("blocks.0.mixer.scan.x_proj", 96), ("blocks.0.mixer.scan.dt_proj", 16), ("blocks.0.mixer.scan.dt_bias", 16)),
    ):
        parts = [path for path in params if path == name or path.rpartition(".")[0] == name]
        assert parts, name
        for path in parts:
            assert 0.7 < abs(params[path]).max() * fan_in**0.5 <= 1 + 1e-6, path
    np.testing.assert_allclose(params["blocks.0.mixer.scan.A_log"][0, 5], np.log(np.arange(1, 97)), rtol=1e-6)
    assert 0.7 < params["cls_token"].std() < 1.3


@pytest.mark.parametrize("options", KINDS)
def test_official_names_go_there_and_back_to_the_bit(options):
    model = abstract_model("course_vim", **SMALL, **options)
    official = weights_of(model)
    from_torch(model, official)
    back = to_torch(model)
    counters = {name for name in back if name.endswith("num_batches_tracked")}
    assert back.keys() - counters == official.keys()
    assert len(counters) == (12 if "local" in options else 0)
    chex.assert_trees_all_equal({name: back[name] for name in official}, official)


def test_pixels_beyond_the_last_whole_patch_are_left_out():
    model = create_model("course_vim", **SMALL)
    x = jax.random.normal(jax.random.key(0), (1, 7, 5, 3))
    chex.assert_trees_all_equal(model.tokens(x), model.tokens(x[:, :6, :4]))
    with pytest.raises(UserError, match="image size 1x5 is too small: height and width must be at least 2"):
        model(x[:, :1])


def test_dropout_zeroes_values_of_the_tokens_in_training_alone():
    model = create_model("course_vim", **SMALL, dropout=0.25)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    whole = model.tokens(x)
    chex.assert_trees_all_equal(model.tokens(x, key=jax.random.key(1)), whole)
    model.train()
    with pytest.raises(ValueError, match="dropout with rate 0.25 in training mode needs a random key"):
        model.tokens(x)
    dropped = model.tokens(x, key=jax.random.key(1))
    chex.assert_trees_all_equal(model.tokens(x, key=jax.random.key(1)), dropped)
    assert (model.tokens(x, key=jax.random.key(2)) != dropped).any()
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-6)
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.04)  # of 2048 values
    for of_one in (kept.mean((0, 1)), kept.mean(2), kept.mean((1, 2))):  # a channel, a token, an image
        assert of_one.min() > 0
    assert len(np.unique(kept.reshape(-1, 8), axis=0)) > 20  # values draw by themselves


# Its place among the models


def test_it_is_listed_on_demand_alone_and_has_no_card():
    assert list_models("course*") == []
    assert list_models("course*", without_card=True) == ["course_vim", "course_vim_deep"]
    assert set(list_models()) < set(list_models(without_card=True))
    with pytest.raises(UserError, match="model 'course_vim' has no card: it is for experiments"):
        model_card("course_vim")
    with pytest.raises(UserError, match="model 'course_vim' has no card"):
        create_model("course_vim", pretrained="official")


def test_the_commands_know_it(capsys):
    assert print_cards(["course_vim"]) == 2
    assert capsys.readouterr().err.startswith("error: model 'course_vim' has no card")
    assert print_cards(["course*"]) == 2
    assert "course*" in capsys.readouterr().err
    assert analyse(["course_vim"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[:3] == ["course_vim", "0.6", f"{count_flops('course_vim') / 1e6:,.1f}"]
    assert count_flops("course_vim") == count_flops("course_vim", 32)
