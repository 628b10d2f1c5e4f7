"""EfficientVMamba: sizes, initial values, inputs, modes and precision. Parity is in tests/weights."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax import create_model, list_models
from evmamba_jax.arrays import check_same_shapes, merge, split
from evmamba_jax.errors import UserError

SMALL = {"width": 16, "depths": (1, 1, 1, 1), "num_classes": 10, "d_state": 4}


@pytest.fixture(scope="module")
def small():
    return create_model("evmamba_t", **SMALL)


# A module is a pytree, so it can be an argument of jit; in training mode this drops the new batch statistics.
run = jax.jit(lambda model, x, key=None: model(x, key=key))


def images(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def test_list_models_filters():
    assert list_models("evmamba_[ts]") == ["evmamba_s", "evmamba_t"]
    assert list_models("nothing*") == []


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown model 'evmamba_tiny'.*did you mean 'evmamba_t'"):
        create_model("evmamba_tiny")
    with pytest.raises(UserError, match="unknown option 'num_class'.*did you mean 'num_classes'"):
        create_model("evmamba_t", num_class=10)
    with pytest.raises(UserError, match=r"depths must name the blocks of four stages.*\(2, 2\)"):
        create_model("evmamba_t", depths=(2, 2))


# Initial values: each against the distribution the official code draws from.


@pytest.fixture(scope="module")
def fresh():
    _, params, stats = split(create_model("evmamba_t", rngs=nnx.Rngs(3)))
    return {**params, **stats}


# The gates of the first two stages are linear layers, those of the last two convolutions.
LINEAR_GATES = ("stages.0.", "stages.1.")
CONV_GATES = ("stages.2.", "stages.3.")


def selected(arrays, *endings, below=""):
    found = {
        name: np.asarray(a, np.float64)
        for name, a in arrays.items()
        if name.endswith(endings) and name.startswith(below)
    }
    assert found
    return found


def test_a_log_d_and_norms_start_at_their_constants(fresh):
    for a_log in selected(fresh, "A_log").values():
        expected = np.broadcast_to(np.log(np.arange(1, 17)), a_log.shape)
        chex.assert_trees_all_close(a_log, expected, atol=1e-6)
    ones = selected(fresh, "scan.D", "norm.scale", "out_norm.scale", "norm1.scale", "norm3.scale", "var")
    zeros = selected(fresh, "norm.bias", "out_norm.bias", "norm2.bias", "mean", "head.bias")
    zeros |= selected(fresh, "se.reduce.bias", "se.expand.bias", below=LINEAR_GATES)
    assert all((a == 1).all() for a in ones.values())
    assert all((a == 0).all() for a in zeros.values())


def test_time_steps_start_log_uniform_between_a_thousandth_and_a_tenth(fresh):
    dt = np.concatenate([np.log1p(np.exp(b)).ravel() for b in selected(fresh, "dt_bias").values()])
    assert 0.00099 < dt.min() < 0.0012
    assert 0.09 < dt.max() < 0.1001
    # log-uniform: deciles of log(dt) are evenly spaced
    deciles = np.quantile(np.log(dt), np.linspace(0, 1, 11))
    chex.assert_trees_all_close(deciles, np.linspace(np.log(0.001), np.log(0.1), 11), atol=0.25)


def uniform_within(array, bound):
    assert abs(array).max() <= bound * (1 + 1e-6)
    assert array.size < 300 or abs(array).max() > 0.97 * bound
    if array.size > 3000:
        np.testing.assert_allclose(array.std(), bound / math.sqrt(3), rtol=0.05)


def test_scan_projections_are_uniform(fresh):
    for w in selected(fresh, "x_proj").values():  # (K, E, R + 2N)
        uniform_within(w, w.shape[1] ** -0.5)
    for w in selected(fresh, "dt_proj").values():  # (K, R, E)
        uniform_within(w, w.shape[1] ** -0.5)


def test_linear_layers_are_normal_with_deviation_002(fresh):
    layers = selected(fresh, "in_proj.kernel", "out_proj.kernel", "reduction.kernel", "head.kernel")
    layers |= selected(fresh, "se.reduce.kernel", "se.expand.kernel", below=LINEAR_GATES)
    for name, w in layers.items():
        np.testing.assert_allclose(w.std(), 0.02, rtol=0.25 if w.size < 1000 else 0.05, err_msg=name)
        assert abs(w).max() > 0.02 * math.sqrt(3), name  # not uniform of that deviation


def test_convolutions_are_uniform_by_fan_in(fresh):
    convs = selected(fresh, "proj.kernel", "dw.kernel", "conv2d.kernel", "pw.kernel", "pw1.kernel", "pw2.kernel")
    convs |= selected(fresh, "se.reduce.kernel", "se.expand.kernel", below=CONV_GATES)
    convs = {n: w for n, w in convs.items() if "in_proj" not in n and "out_proj" not in n}
    for name, w in convs.items():
        fan_in = math.prod(w.shape[:-1])
        uniform_within(w, fan_in**-0.5)
        bias = fresh.get(name.replace("kernel", "bias"))
        if bias is not None:
            uniform_within(np.asarray(bias, np.float64), fan_in**-0.5)


# Inputs


@pytest.mark.parametrize("size", [(4, 4), (33, 61), (64, 36), (100, 30)])
def test_any_size_gives_maps_of_half_the_size_each(small, size):
    maps = jax.eval_shape(lambda model, x: model.features(x), small, images(2, *size, 3))
    h, w = size[0] // 4, size[1] // 4
    for i, stage in enumerate(maps):
        chex.assert_shape(stage, (2, h, w, 16 * 2**i))
        h, w = -(-h // 2), -(-w // 2)


def test_maps_of_one_pixel_are_finite(small):
    chex.assert_tree_all_finite(run(small, images(2, 4, 4, 3)))


def test_head_uses_the_last_map(small):
    x = images(2, 32, 32, 3)
    pooled = jax.jit(lambda model, x: model.norm(model.features(x)[-1]).mean((1, 2)))(small, x)
    expected = pooled @ small.head.kernel[...] + small.head.bias[...]
    chex.assert_trees_all_close(run(small, x), expected, rtol=1e-5, atol=1e-5)


def test_no_classes_gives_pooled_features_and_channels_are_free():
    model = create_model("evmamba_t", **{**SMALL, "num_classes": 0}, in_channels=1)
    chex.assert_shape(run(model, images(2, 16, 16, 1)), (2, 128))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 32, 32), r"images must be \(batch, height, width, 3\).*got float32 of shape \(2, 3, 32, 32\)"),
        ((32, 32, 3), "images must be"),
        ((1, 3, 32, 3), "image size 3x32 is too small: height and width must be at least 4"),
    ],
)
def test_wrong_images_are_refused(small, shape, message):
    with pytest.raises(UserError, match=message):
        small(images(*shape))


# Modes


def test_evaluation_is_the_default_and_deterministic():
    model = create_model("evmamba_t", **SMALL, drop_path_rate=0.5)
    x = images(2, 32, 32, 3)
    chex.assert_trees_all_equal(run(model, x), run(model, x, jax.random.key(0)))


def test_training_mode_draws_drop_path_and_moves_batch_statistics():
    model = create_model("evmamba_t", **SMALL, drop_path_rate=0.5)
    model.train()
    x = images(8, 32, 32, 3)
    with pytest.raises(ValueError, match="needs a random key"):
        model(x)
    graphdef, params, before = split(model)

    @jax.jit
    def step(key):
        trained = merge(graphdef, params, before)
        return trained(x, key=key), split(trained).batch_stats

    (one, after), (again, _), (other, _) = (step(jax.random.key(k)) for k in (0, 0, 1))
    assert jnp.abs(one - other).max() > 1e-3
    chex.assert_trees_all_equal(one, again)
    assert all((before[name] != after[name]).any() for name in before)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    from evmamba_jax.layers.drop_path import DropPath

    drop = DropPath(0.25)
    drop.train()
    y = np.asarray(drop(jnp.ones((4000, 2, 3)), jax.random.key(0)))
    per_sample = y.reshape(4000, -1)
    assert set(np.unique(per_sample).tolist()) == {0.0, np.float32(1 / 0.75).item()}
    assert (per_sample == per_sample[:, :1]).all()
    np.testing.assert_allclose(y.mean(), 1, atol=0.04)


def test_batch_norm_follows_pytorch():
    from evmamba_jax.layers.norm import BatchNorm

    norm = BatchNorm(5, rngs=nnx.Rngs(0))
    norm.train()
    rng = np.random.default_rng(0)
    mean, var = np.zeros(5), np.ones(5)
    for _ in range(3):
        x = rng.normal(2, 3, (4, 3, 2, 5))
        y = norm(jnp.float32(x))
        chex.assert_trees_all_close(
            np.asarray(y), ((x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)).astype(np.float32), atol=1e-5
        )
        mean = 0.9 * mean + 0.1 * x.mean((0, 1, 2))
        var = 0.9 * var + 0.1 * x.var((0, 1, 2), ddof=1)  # torch.nn.BatchNorm2d keeps the unbiased variance
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)


def test_depthwise_convolution_equals_a_slow_one():
    from evmamba_jax.layers.projections import depthwise_conv

    conv = depthwise_conv(3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    kernel, padded = np.asarray(conv.kernel[...], np.float64), np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros(x.shape)
    for i in range(5):
        for j in range(4):
            expected[:, i, j] = np.einsum("bhwc,hwc->bc", padded[:, i : i + 3, j : j + 3], kernel[:, :, 0])
    np.testing.assert_allclose(conv(x), expected + np.asarray(conv.bias[...]), atol=1e-5)
    # An accelerator keeps the library convolution, which it is good at.
    tpu = jax.jit(conv).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    cpu = jax.jit(conv).lower(x).as_text()
    assert "stablehlo.convolution" in tpu
    assert "stablehlo.convolution" not in cpu


# Precision


def test_bfloat16_stays_within_two_per_cent():
    x = images(4, 64, 64, 3)
    reference = run(create_model("evmamba_t"), x)
    logits = run(create_model("evmamba_t", dtype=jnp.bfloat16), x)
    assert logits.dtype == jnp.bfloat16
    error = jnp.linalg.norm(logits.astype(jnp.float32) - reference) / jnp.linalg.norm(reference)
    assert 1e-5 < error < 0.02  # above zero: it did compute in bfloat16


# The module as dictionaries


def test_split_and_merge_are_inverse(small):
    graphdef, params, stats = split(small)
    x = images(1, 16, 16, 3)
    chex.assert_trees_all_equal(run(merge(graphdef, params, stats), x), run(small, x))


def test_shapes_that_differ_are_listed():
    a = {"x": np.zeros((2, 3)), "y": np.zeros(1)}
    check_same_shapes(a, dict(a), "this", "that")
    with pytest.raises(
        UserError, match=r"this does not fit that: x: \(3, 2\), expected \(2, 3\); z: \(1,\), expected absent"
    ):
        check_same_shapes(a, {"x": np.zeros((3, 2)), "y": np.zeros(1), "z": np.zeros(1)}, "this", "that")
