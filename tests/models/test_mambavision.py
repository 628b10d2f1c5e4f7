"""MambaVision: sizes, initial values, mixer, windows, inputs, modes and precision. Parity is in tests/weights."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax import create_model
from evmamba_jax.arrays import merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.layers.drop_path import DropPath
from evmamba_jax.models import abstract_model
from evmamba_jax.models.mambavision import Attention, MambaVisionMixer, WindowStage, to_windows
from evmamba_jax.weights import from_torch, to_torch

SMALL = {
    "width": 16,
    "stem_width": 8,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 1, 4, 4),
    "window_size": (8, 8, 4, 2),
    "num_classes": 10,
    "layer_scale": 0.5,
}


@pytest.fixture(scope="module")
def small():
    return create_model("mambavision_t", **SMALL)


# A module is a pytree, so it can be an argument of jit.
run = jax.jit(lambda model, x: model(x))
features = jax.jit(lambda model, x: model.features(x))


def images(*shape):
    return jax.random.normal(jax.random.key(1), shape)


# Sizes


@pytest.mark.parametrize(
    ("name", "attention", "layer_scale"),
    [
        ("mambavision_t", [(4, 8), (2, 4)], False),
        ("mambavision_t2", [(6, 11), (2, 4)], False),
        ("mambavision_s", [(4, 7), (3, 5)], False),
        ("mambavision_b", [(5, 10), (3, 5)], True),
        ("mambavision_l", [(5, 10), (3, 5)], True),
        ("mambavision_l2", [(6, 12), (3, 5)], True),
        ("mambavision_l2_512", [(6, 12), (3, 5)], True),
        ("mambavision_l3_256", [(10, 20), (5, 10)], True),
        ("mambavision_l3_512", [(10, 20), (5, 10)], True),
    ],
)
def test_blocks_are_the_official_ones(name, attention, layer_scale):
    model = abstract_model(name)
    for stage, (first, end) in zip(model.stages[2:], attention, strict=True):
        attends = [j for j, block in enumerate(stage.blocks) if isinstance(block.mixer, Attention)]
        assert attends == list(range(first, end))
        assert len(stage.blocks) == end
    assert any("gamma" in path for path in split(model).params) == layer_scale


@pytest.mark.parametrize(
    ("name", "size", "windows", "heads"),
    [
        ("mambavision_b", 224, (14, 7), (8, 16)),
        ("mambavision_l2", 224, (14, 7), (16, 32)),
        ("mambavision_l2_512", 512, (32, 16), (16, 32)),
        ("mambavision_l3_256", 256, (16, 8), (16, 32)),
        ("mambavision_l3_512", 512, (32, 16), (16, 32)),
    ],
)
def test_published_windows_are_the_maps_of_the_published_size(name, size, windows, heads):
    model = abstract_model(name)
    for i in (0, 1):
        assert model.stages[2 + i].window == windows[i] == size // (16, 32)[i]
        assert model.stages[2 + i].blocks[-1].mixer.num_heads == heads[i]


# Initial values


@pytest.fixture(scope="module")
def fresh():
    model = create_model("mambavision_t", width=64, depths=(1, 1, 2, 2), layer_scale=1e-5, rngs=nnx.Rngs(3))
    _, params, stats = split(model)
    return {path: np.asarray(array, np.float64) for path, array in {**params, **stats}.items()}


def selected(arrays, *endings):
    found = {path: array for path, array in arrays.items() if path.endswith(endings)}
    assert found
    return found


def test_constants(fresh):
    for a_log in selected(fresh, "A_log").values():
        chex.assert_trees_all_close(a_log, np.broadcast_to(np.log(np.arange(1, 9)), a_log.shape), atol=1e-6)
    linear = ("qkv.bias", "proj.bias", "fc1.bias", "fc2.bias", "head.bias")
    norms = ("norm.bias", "norm1.bias", "norm2.bias")
    assert all((a == 1).all() for a in selected(fresh, "scan.D", "norm.scale", "norm1.scale", "norm2.scale").values())
    assert all((a == 0).all() for a in selected(fresh, "dt_bias", *linear, *norms).values())
    assert all((a == np.float32(1e-5)).all() for a in selected(fresh, "gamma_1", "gamma_2").values())
    assert len(selected(fresh, "gamma_1", "gamma_2")) == 8


def test_linear_layers_time_steps_included_are_normal_with_deviation_002(fresh):
    linear = ("in_proj", "out_proj", "qkv", "mixer.proj", "fc1", "fc2", "head")
    for path, w in selected(fresh, "x_proj", "dt_proj", *(f"{name}.kernel" for name in linear)).items():
        np.testing.assert_allclose(w.std(), 0.02, rtol=0.05, err_msg=path)
        assert abs(w).max() > 0.02 * math.sqrt(3), path  # not uniform of that deviation


def test_convolutions_are_uniform_by_fan_in(fresh):
    convolutions = ("conv1.kernel", "conv2.kernel", "conv_x.kernel", "conv_z.kernel", "downsample.kernel")
    for path, w in selected(fresh, *convolutions).items():
        bound = math.prod(w.shape[:-1]) ** -0.5
        assert 0.97 * bound < abs(w).max() <= bound * (1 + 1e-6), path
        bias = fresh.get(path.replace("kernel", "bias"))
        assert (bias is None) == (".blocks." not in path or ".mixer." in path), path  # stem, downsampling, mixer
        assert bias is None or 0.9 * bound < abs(bias).max() <= bound * (1 + 1e-6), path


@pytest.mark.parametrize("double", [True, False])
def test_mamba_dt_init_gives_the_scan_mambas_time_steps(double):
    mixer = MambaVisionMixer(4096, double_dt_bias=double, mamba_dt_init=True, rngs=nnx.Rngs(0))
    added = np.asarray(mixer.scan.dt_bias[...], np.float64) * (2 if double else 1)
    dt = np.log1p(np.exp(added))
    deciles = np.quantile(np.log(dt), np.linspace(0, 1, 11))
    chex.assert_trees_all_close(deciles, np.linspace(np.log(0.001), np.log(0.1), 11), atol=0.15)
    dt_proj = np.asarray(mixer.scan.dt_proj[...])
    assert 0.99 / 16 < abs(dt_proj).max() <= 1 / 16 * (1 + 1e-6)  # uniform within +-1/sqrt(R), R = 256
    np.testing.assert_allclose(np.asarray(mixer.scan.x_proj[...]).std(), 0.02, rtol=0.02)


# The mixer


def silu(x):
    return x / (1 + np.exp(-x))


def slow_mixer(p, x, times):
    """The mixer of the paper, token by token; the bias of the time step enters ``times`` times."""
    width, (length, rank, state) = x.shape[2], (p["conv_x.kernel"].shape[0], p["scan.dt_proj"].shape[1], 8)
    before = (length - 1) // 2
    padded = np.pad(x @ p["in_proj.kernel"], ((0, 0), (before, length - 1 - before), (0, 0)))
    halves = np.split(padded, 2, axis=-1)
    x, z = (
        silu(sum(half[:, k : k + x.shape[1]] * p[f"{name}.kernel"][k, 0] for k in range(length)))
        for half, name in zip(halves, ("conv_x", "conv_z"), strict=True)
    )
    h, ys = np.zeros((x.shape[0], width // 2, state)), []
    for t in range(x.shape[1]):
        projected = x[:, t] @ p["scan.x_proj"][0]
        dt, b, c = np.split(projected, [rank, rank + state], axis=-1)
        dt = np.log1p(np.exp(dt @ p["scan.dt_proj"][0] + times * p["scan.dt_bias"][0]))
        h = np.exp(dt[:, :, None] * -np.exp(p["scan.A_log"][0])) * h + (dt * x[:, t])[:, :, None] * b[:, None]
        ys.append((h * c[:, None]).sum(-1) + p["scan.D"][0] * x[:, t])
    return np.concatenate([np.stack(ys, 1), z], -1) @ p["out_proj.kernel"]


@pytest.mark.parametrize(("double", "d_conv"), [(True, 3), (False, 4)])
def test_mixer_equals_a_slow_one(double, d_conv):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        mixer = MambaVisionMixer(8, d_conv=d_conv, double_dt_bias=double, rngs=nnx.Rngs(0))
        graphdef, params, _ = split(mixer)
        params = {path: rng.normal(size=array.shape) for path, array in params.items()}
        x = rng.normal(size=(2, 7, 8))
        y = jax.jit(lambda params, x: merge(graphdef, params, {})(x))(params, x)
    assert y.dtype == np.float64
    chex.assert_trees_all_close(np.asarray(y), slow_mixer(params, x, 2 if double else 1), rtol=1e-10, atol=1e-10)


# Windows


def slow_windows(x, size):
    """Cut (B, H, W, C) pixel by pixel, zeros outside."""
    batch, height, width, channels = x.shape
    windows = []
    for b in range(batch):
        for top in range(0, height, size):
            for left in range(0, width, size):
                window = np.zeros((size * size, channels), x.dtype)
                for i in range(size):
                    for j in range(size):
                        if top + i < height and left + j < width:
                            window[i * size + j] = x[b, top + i, left + j]
                windows.append(window)
    return np.stack(windows)


SHAPES = [(2, 5, 9, 3), (1, 8, 4, 3), (2, 1, 2, 3)]  # padded both ways, not at all, smaller than a window


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_equal_slow_ones(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    chex.assert_trees_all_equal(to_windows(jnp.asarray(x), 4), slow_windows(x, 4))


class AddTokens(nnx.Module):
    """Adds to every token the sum of its sequence, weighted by position."""

    def __call__(self, x, key=None):
        weights = jnp.arange(1.0, x.shape[1] + 1)[:, None]
        return x + ((x + 1) * weights).sum(1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_see_windows_with_their_padding(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = WindowStage([AddTokens()], None, 4)(jnp.asarray(x))
    expected = np.zeros(shape)
    sums = ((slow_windows(x, 4) + 1) * np.arange(1, 17)[:, None]).sum(1)
    rows, columns = -(-shape[1] // 4), -(-shape[2] // 4)
    for b, i, j in np.ndindex(*shape[:3]):
        expected[b, i, j] = x[b, i, j] + sums[(b * rows + i // 4) * columns + j // 4]
    chex.assert_trees_all_close(np.asarray(y), expected.astype(np.float32), rtol=1e-5)


class Dropped(nnx.Module):
    def __init__(self, rate):
        self.drop_path = DropPath(rate)

    def __call__(self, x, key=None):
        return self.drop_path(jnp.ones_like(x), key)


def test_drop_path_drops_whole_windows():
    stage = WindowStage([Dropped(0.5)], None, 4)
    stage.train()
    kept = np.asarray(stage(jnp.zeros((4, 16, 16, 1)), jax.random.key(0))) > 0
    windows = slow_windows(kept, 4)[:, :, 0]
    assert (windows == windows[:, :1]).all()
    assert 16 < windows[:, 0].sum() < 48  # of 64; drawn by sample they could only be multiples of 16
    assert windows[:, 0].sum() % 16


# Inputs


@pytest.mark.parametrize("size", [(1, 1), (33, 61), (100, 30), (224, 320)])
def test_any_size_gives_maps_of_half_the_size_each(small, size):
    maps = jax.eval_shape(lambda model, x: model.features(x), small, jnp.zeros((2, *size, 3)))
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    for i, stage in enumerate(maps):
        chex.assert_shape(stage, (2, h, w, 16 * 2**i))
        h, w = -(-h // 2), -(-w // 2)


def test_head_takes_the_mean_of_the_normalised_last_map(small):
    x = images(2, 33, 61, 3)
    last = np.asarray(features(small, x)[-1], np.float64)
    # a fresh BatchNorm: mean 0, variance 1
    expected = (last / math.sqrt(1 + 1e-5)).mean((1, 2)) @ np.asarray(small.head.kernel[...], np.float64)
    chex.assert_trees_all_close(np.asarray(run(small, x), np.float64), expected, rtol=1e-5, atol=1e-6)


def test_backbone_takes_a_classifiers_weights_and_normalises_every_map(small):
    backbone = create_model("mambavision_t", **SMALL, out_norms=True, rngs=nnx.Rngs(9))
    from_torch(backbone, to_torch(small))
    x = images(2, 33, 61, 3)
    for ours, plain in zip(features(backbone, x), features(small, x), strict=True):
        plain = np.asarray(plain, np.float64)
        centred = plain - plain.mean(-1, keepdims=True)
        expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
        chex.assert_trees_all_close(np.asarray(ours, np.float64), expected, rtol=1e-4, atol=1e-4)


def test_official_names_and_back_keep_every_bit(small):
    official = to_torch(small)
    assert {"levels.2.blocks.0.gamma_1", "levels.2.blocks.1.mixer.qkv.weight", "levels.3.blocks.0.mixer.A_log"} <= set(
        official
    )
    again = create_model("mambavision_t", **SMALL, rngs=nnx.Rngs(5))
    from_torch(again, official)
    chex.assert_trees_all_equal(split(again)[1:], split(small)[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2, 4, 6, 16)}, "num_heads has 6 for a stage of width 320: take a divisor of the width"),
        ({"num_heads": (8, 16)}, r"num_heads must give one positive number for each of four stages; got \(8, 16\)"),
        ({"window_size": (8, 8, 0, 7)}, r"window_size=\(8, 8, 0, 7\) is not allowed: it must be numbers 1 or more"),
        ({"depths": (2, 2)}, "depths must name the blocks of four stages"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        abstract_model("mambavision_t", **options)


def test_wrong_images_are_refused(small):
    with pytest.raises(UserError, match=r"images must be \(batch, height, width, 3\)"):
        small(images(2, 3, 32, 32))


# Modes and precision


def test_training_step_in_bfloat16_moves_statistics_and_has_finite_float32_gradients(small):
    options = {**SMALL, "drop_path_rate": 0.5, "dtype": jnp.bfloat16}
    model = create_model("mambavision_t", **options)
    model.train()
    graphdef, params, before = split(model)

    def loss(params, key):
        model = merge(graphdef, params, before)
        logits = model(images(4, 48, 32, 3), key=key)
        return jnp.square(logits.astype(jnp.float32)).sum(), (logits, split(model).batch_stats)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (one, after)), gradients = step(params, jax.random.key(0))
    (_, (other, _)), _ = step(params, jax.random.key(1))
    assert one.dtype == jnp.bfloat16
    assert jnp.abs(one - other).max() > 1e-3
    assert all((before[path] != after[path]).any() for path in before)
    chex.assert_tree_all_finite(gradients)
    assert all(gradient.dtype == jnp.float32 for gradient in gradients.values())
    assert all((gradient != 0).any() for gradient in gradients.values())


def test_bfloat16_stays_within_two_per_cent(small):
    x = images(4, 33, 61, 3)
    model = create_model("mambavision_t", **SMALL, dtype=jnp.bfloat16)
    error = run(model, x).astype(jnp.float32) - run(small, x)
    assert 1e-5 < jnp.linalg.norm(error) / jnp.linalg.norm(run(small, x)) < 0.02


def test_softmax_is_float32_in_bfloat16():
    attention = Attention(16, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jaxpr = str(jax.make_jaxpr(lambda x: attention(x))(jnp.zeros((1, 6, 16), jnp.bfloat16)))
    exponentials = [line for line in jaxpr.splitlines() if "= exp " in line]
    assert exponentials
    assert all("f32[" in line and "bf16" not in line for line in exponentials)
