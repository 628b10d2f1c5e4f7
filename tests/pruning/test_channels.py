"""Channels masked and cut: the same logits from fewer weights, for every family that has such channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax import create_model, pruning
from evmamba_jax.arrays import fill, split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.errors import UserError
from evmamba_jax.layers.channels import Group, Member, groups
from evmamba_jax.models import list_models
from evmamba_jax.models.registry import abstract_model
from evmamba_jax.weights import to_torch

SMALL = {  # a model, and how many groups it has
    "vim": ("vim_t", {"width": 16, "depth": 3, "image_size": 32, "patch_size": 8, "stride": 8}, 3),
    "vim_mobilenet": (
        "vim_t",
        {"width": 8, "depth": 1, "image_size": 32, "patch_size": 8, "stride": 8, "local": "inverted_residual"},
        1,
    ),
    "mambavision": (
        "mambavision_t",
        {"width": 16, "stem_width": 8, "depths": (1, 1, 2, 2), "num_heads": (2, 2, 4, 4)},
        10,
    ),
    "vmamba": ("vmamba_t", {"width": 8, "depths": (1, 1, 1, 1)}, 8),
    "vmamba_v0": ("vmamba_t_v0", {"width": 8, "depths": (1, 0, 1, 0), "d_state": 4}, 2),
    "msvmamba": ("msvmamba_n", {"width": 16, "depths": (1, 0, 0, 1)}, 4),
    "evmamba": ("evmamba_t", {"width": 16, "depths": (1, 1, 1, 0)}, 2),
}


def small(family):
    """Return a small model whose every array differs from its initial values, biases and norms too."""
    name, options, _ = SMALL[family]
    model = create_model(name, num_classes=5, **options)
    rng = np.random.default_rng(0)
    _, params, stats = split(model)
    params = {n: p + 0.1 * rng.normal(size=p.shape).astype(np.float32) for n, p in params.items()}
    stats = {n: s + 0.1 * rng.random(s.shape).astype(np.float32) for n, s in stats.items()}
    fill(model, params, stats)
    return model


def masked_and_cut(model, sparsity=0.4, scope="layer"):
    found = pruning.channels(model)
    params = split(model).params
    kept = pruning.select_channels(pruning.channel_scores(params, found), sparsity, scope=scope)
    masks = pruning.channel_masks(params, found, kept)
    stats = split(model).batch_stats
    fill(model, pruning.apply(params, masks), stats)
    return model, pruning.cut(model, masks), kept


IMAGES = np.random.default_rng(1).standard_normal((2, 64, 64, 3), np.float32)


def logits(model, images=IMAGES):
    return np.asarray(jax.jit(lambda x: model(x))(jnp.asarray(images)))


@pytest.mark.parametrize("family", SMALL)
def test_a_cut_model_has_the_masked_models_logits(family, tmp_path):
    name, options, count = SMALL[family]
    assert len(pruning.channels(small(family))) == count
    masked, cut, kept = masked_and_cut(small(family))
    with jax.enable_x64(True):
        for model in (masked, cut):
            _, params, stats = split(model)
            fill(model, *({n: np.asarray(a, np.float64) for n, a in arrays.items()} for arrays in (params, stats)))
        wanted, found = (logits(model, IMAGES.astype(np.float64)) for model in (masked, cut))
    assert wanted.dtype == np.float64
    assert np.abs(wanted - found).max() < 1e-12 * np.sqrt((wanted**2).mean())
    for group in groups(cut):
        assert group.size == int(kept[group.name].sum()) < len(kept[group.name])
    sizes = [sum(p.size for p in split(m).params.values()) for m in (cut, masked)]
    assert sizes[0] < sizes[1]

    # What is left is an option, so that weights find their model again.
    again = create_model(name, num_classes=5, **options, inner=cut.config.inner)
    shapes = [{n: p.shape for n, p in split(m).params.items()} for m in (cut, again)]
    assert shapes[0] == shapes[1]
    meta = {"model": name, "options": {**options, "inner": cut.config.inner, "num_classes": 5}}
    save_model(tmp_path / "cut", params=split(cut).params, batch_stats=split(cut).batch_stats, meta=meta)
    loaded = create_model(name, pretrained=tmp_path / "cut", num_classes=5, **options)
    assert np.abs(logits(loaded) - found).max() < 1e-5 * np.sqrt((found**2).mean())


def test_a_cut_model_can_be_cut_again_but_has_no_official_file():
    _, cut, _ = masked_and_cut(small("vmamba"))
    with pytest.raises(UserError, match=r"VMamba with inner=.* has no official names: only inner=\(\) has weights"):
        to_torch(cut)
    masked, again, _ = masked_and_cut(cut)
    wanted, found = logits(masked), logits(again)
    assert np.abs(wanted - found).max() < 1e-5 * np.sqrt((wanted**2).mean())


@pytest.mark.parametrize("name", list_models())
def test_every_member_of_every_model_exists(name):
    model = abstract_model(name)
    arrays = split(model).params | split(model).batch_stats
    for group in pruning.channels(model):
        for member in group.members:
            length = arrays[member.path].shape[member.axis]
            assert member.places(np.arange(group.size)).max() < length, member
            if member.path.endswith("out_proj.kernel") and not group.name.endswith((".x", ".z")):
                assert length == group.size


def test_the_score_is_the_mean_of_the_sums_of_squares():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 12)), "b": rng.normal(size=(6, 3)), "c": rng.normal(size=6)}
    members = Member("a", 1, weight=True), Member("a", 1, 6, weight=True), Member("b", 0, weight=True), Member("c", 0)
    found = pruning.channel_scores({n: jnp.asarray(p) for n, p in params.items()}, [Group("g", 6, members)])["g"]
    for e in range(6):
        parts = [(params["a"][:, e] ** 2).sum(), (params["a"][:, 6 + e] ** 2).sum(), (params["b"][e] ** 2).sum()]
        np.testing.assert_allclose(found[e], np.mean(parts), rtol=1e-5)


def test_how_many_channels_stay():
    scores = {"a": jnp.arange(20.0), "b": jnp.arange(7.0)}
    kept = pruning.select_channels(scores, 0.5, multiple_of=8)
    assert [int(mask.sum()) for mask in kept.values()] == [16, 7]
    assert not kept["a"][:4].any()
    kept = pruning.select_channels({"a": jnp.arange(1.0, 5), "b": jnp.full(4, 0.1)}, 1.0, scope="global")
    assert [int(mask.sum()) for mask in kept.values()] == [1, 1]  # each group keeps its best
    assert kept["a"][3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: pruning.channels(create_model("course_vim")), "CourseVim has no channels that can be cut"),
        (lambda m: pruning.cut(m, {"x": np.ones(3)}), "the mask of x fits no parameter here: the masks are of another"),
        (lambda m: pruning.cut(m, single(m)), "prunes single weights, which cannot be cut"),
        (lambda m: create_model("vim_t", inner=(("blocks.0.mixr", 8),)), "'blocks.0.mixr' is no group of channels"),
        (lambda m: create_model("vim_t", inner=(("blocks.0.mixer", 999),)), "channels 0 to 383 can be kept"),
        (lambda m: create_model("vim_t", inner="half"), "pairs of a group's name and a number"),
        (lambda m: pruning.select_channels({"a": jnp.ones(4)}, 0.5, scope="global", multiple_of=8), "needs scope='la"),
    ],
)
def test_mistakes_get_one_line(call, message):
    with pytest.raises(UserError, match=message) as refused:
        call(small("vim_mobilenet"))
    assert "\n" not in str(refused.value)


def single(model):
    params = split(model).params
    return pruning.select({name: jnp.abs(params[name]) for name in pruning.prunable(params)}, 0.5)
