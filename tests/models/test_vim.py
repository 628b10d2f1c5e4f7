"""Vim: sizes, initial values, a slow reference, position embedding, inputs, modes. Parity is in tests/weights."""

import math
from importlib import import_module

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax import checkpoints, create_model
from evmamba_jax.arrays import merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.models.vim import resize_pos_embed
from evmamba_jax.weights import from_torch, to_torch

SMALL = {"width": 8, "depth": 3, "num_classes": 5, "image_size": 16, "patch_size": 4, "stride": 4, "d_state": 3}


def small(**options):
    return create_model("vim_t", **{**SMALL, **options})


run = jax.jit(lambda model, x, key=None: model(x, key=key))


def images(*shape):
    return jax.random.normal(jax.random.key(1), shape)


# Initial values: each against the distribution the official code draws from.


@pytest.fixture(scope="module")
def fresh():
    """Return parameters of a wide model by name, those of its four blocks together."""
    _, params, _ = split(create_model("vim_t", width=192, depth=4, num_classes=50, rngs=nnx.Rngs(3)))
    together = {}
    for path, array in params.items():
        name = path.split(".", 2)[2] if path.startswith("blocks.") else path
        together.setdefault(name, []).append(np.asarray(array, np.float64))
    return {name: np.concatenate(arrays) for name, arrays in together.items()}


def test_constants(fresh):
    for way in ("forward", "backward"):
        a_log = fresh[f"mixer.{way}.scan.A_log"]
        np.testing.assert_allclose(a_log, np.broadcast_to(np.log(np.arange(1, 17)), (4, 384, 16)), atol=1e-6)
    for name in ("mixer.forward.scan.D", "mixer.backward.scan.D", "norm.scale"):
        assert (fresh[name] == 1).all(), name
    for name in ("mixer.backward.scan.dt_bias", "head.bias", "patch_embed.bias"):
        assert (fresh[name] == 0).all(), name


def log_uniform_time_steps(dt_bias):
    deciles = np.quantile(np.log(np.log1p(np.exp(dt_bias))), np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(np.log(0.001), np.log(0.1), 11), atol=0.25)


def test_time_steps_start_as_in_mamba_forwards_only_or_both_ways(fresh):
    log_uniform_time_steps(fresh["mixer.forward.scan.dt_bias"])
    both = create_model("vim_t", width=192, depth=1, mamba_dt_init_backward=True).blocks[0].mixer
    log_uniform_time_steps(np.asarray(both.forward.scan.dt_bias[...], np.float64))
    log_uniform_time_steps(np.asarray(both.backward.scan.dt_bias[...], np.float64))
    assert (both.forward.scan.dt_bias[...] != both.backward.scan.dt_bias[...]).all()


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj.kernel", 192**-0.5),
        ("out_proj.kernel", 384**-0.5 / 4**0.5),  # four blocks
        *((f"{way}.conv.kernel", 0.5) for way in ("forward", "backward")),
        *((f"{way}.conv.bias", 0.5) for way in ("forward", "backward")),
        *((f"{way}.scan.x_proj", 384**-0.5) for way in ("forward", "backward")),
        *((f"{way}.scan.dt_proj", 12**-0.5) for way in ("forward", "backward")),
    ],
)
def test_layers_of_the_mixer_are_uniform(fresh, name, bound):
    values = fresh[f"mixer.{name}"]
    assert 0.99 * bound < abs(values).max() <= bound * (1 + 1e-6)
    deciles = np.quantile(values, np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=2 * bound * 2 / math.sqrt(values.size))


@pytest.mark.parametrize(
    ("name", "deviation"),
    [("patch_embed.kernel", 768**-0.5 / 0.8796), ("pos_embed", 0.02), ("cls_token", 0.02), ("head.kernel", 0.02)],
)
def test_the_rest_is_normal(fresh, name, deviation):
    values = fresh[name]
    few = 3 / math.sqrt(values.size)
    np.testing.assert_allclose(values.std(), deviation, rtol=few)
    np.testing.assert_allclose((abs(values) < deviation).mean(), 0.683, atol=few)
    assert values.size < 5000 or abs(values).max() > 3 * deviation  # not cut at two deviations


# The whole model against loops in NumPy, written from the formulas.


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def slow_causal(p, x):
    """Convolve (L, E) with the three tokens before."""
    padded = np.concatenate([np.zeros((3, x.shape[1])), x])
    return sum(padded[i : i + len(x)] * p["kernel"][i, 0] for i in range(4)) + p["bias"]


def slow_depthwise(kernel, x):
    """Convolve (h, w, C) with a kernel (3, 3, 1, C), pixel by pixel."""
    y = np.zeros_like(x)
    for row, column, i, j in np.ndindex(*x.shape[:2], 3, 3):
        r, c = row + i - 1, column + j - 1
        if 0 <= r < x.shape[0] and 0 <= c < x.shape[1]:
            y[row, column] += x[r, c] * kernel[i, j, 0]
    return y


def slow_inverted_residual(p, x):
    """Return MobileNetV2's block of (h, w, C): 1x1, BatchNorm, ReLU6, 3x3, BatchNorm, ReLU6, 1x1, BatchNorm, sum."""

    def normed(x, name):
        deviation = np.sqrt(p[f"{name}.var"] + 1e-5)
        return (x - p[f"{name}.mean"]) / deviation * p[f"{name}.scale"] + p[f"{name}.bias"]

    y = np.clip(normed(x @ p["pw1.kernel"], "norm1"), 0, 6)
    y = np.clip(normed(slow_depthwise(p["dw.kernel"], y), "norm2"), 0, 6)
    return x + normed(y @ p["pw2.kernel"], "norm3")


def slow_local(p, x, grid, middle):
    """Apply a layer of the grid to the patches of (L, E); the class token, if any, passes it by."""
    patches = x if middle is None else np.delete(x, middle, axis=0)
    maps = patches.reshape(*grid, -1)
    maps = slow_inverted_residual(p, maps) if "pw1.kernel" in p else slow_depthwise(p["kernel"], maps) + p["bias"]
    patches = maps.reshape(patches.shape)
    return patches if middle is None else np.insert(patches, middle, x[middle], axis=0)


def slow_direction(p, x, *, reverse, grid, middle):
    """Mix (L, E) with its neighbours, then scan it from either end."""
    conv, way = below(p, "conv."), slice(None, None, -1 if reverse else 1)
    causal = "kernel" in conv and conv["kernel"].ndim == 3
    x = slow_causal(conv, x[way]) if causal else slow_local(conv, x, grid, middle)[way]
    return slow_scan(p, silu(x))[way]


def slow_scan(p, x):
    """Scan (L, E) one by one."""
    rank, state = p["scan.dt_proj"].shape[1], p["scan.A_log"].shape[2]
    h, y = np.zeros((x.shape[1], state)), np.zeros_like(x)
    for t, u in enumerate(x):
        dt, b, c = np.split(u @ p["scan.x_proj"][0], [rank, rank + state])
        delta = np.log1p(np.exp(dt @ p["scan.dt_proj"][0] + p["scan.dt_bias"][0]))
        h = np.exp(-delta[:, None] * np.exp(p["scan.A_log"][0])) * h + (delta * u)[:, None] * b
        y[t] = h @ c + p["scan.D"][0] * u
    return y


def below(p, prefix):
    return {name.removeprefix(prefix): a for name, a in p.items() if name.startswith(prefix)}


def slow_rotation(x, rows, columns):
    """Turn each pair of channels of (L, C) by its angle, one after the other."""
    channels, turned = x.shape[1], np.zeros_like(x)
    for token in range(rows * columns):
        for pair in range(channels // 2):
            of_row = pair < channels // 4
            place = token // columns / rows if of_row else token % columns / columns
            angle = 14 * place / 10000 ** (2 * (pair % (channels // 4)) / (channels // 2))
            a, b = x[token, 2 * pair : 2 * pair + 2]
            turned[token, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[token, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def slow_vim(p, image, pos_embed, *, stride, class_token, halve, rope):
    """Return the logits and the residual stream (L, C) after every block, for one image."""
    size = p["patch_embed.kernel"].shape[0]
    rows, columns = ((side - size) // stride + 1 for side in image.shape[:2])
    x = np.stack(
        [
            np.einsum("hwi,hwio->o", image[r * stride :, c * stride :][:size, :size], p["patch_embed.kernel"])
            for r in range(rows)
            for c in range(columns)
        ]
    )
    middle = rows * columns // 2
    x = x + p["patch_embed.bias"]
    if class_token:
        x = np.concatenate([x[:middle], p["cls_token"][0], x[middle:]])
    x = x + pos_embed[0]
    streams = []
    while block := below(p, f"blocks.{len(streams)}."):
        x = slow_rotation(x, rows, columns) if rope else x
        u, z = np.split(rms_norm(x, block["norm.scale"]) @ block["mixer.in_proj.kernel"], 2, axis=-1)
        place = {"grid": (rows, columns), "middle": middle if class_token else None}
        y = slow_direction(below(block, "mixer.forward."), u, reverse=False, **place) * silu(z)
        y = y + slow_direction(below(block, "mixer.backward."), u, reverse=True, **place) * silu(z)
        y = (y / 2 if halve else y) @ block["mixer.out_proj.kernel"]
        if "mixer.se.reduce.kernel" in block:
            hidden = np.maximum(y.mean(0) @ block["mixer.se.reduce.kernel"], 0)
            y = y / (1 + np.exp(-hidden @ block["mixer.se.expand.kernel"]))
        x = x + y
        streams.append(x)
    x = rms_norm(x, p["norm.scale"])
    return (x[middle] if class_token else x.mean(0)) @ p["head.kernel"] + p["head.bias"], streams


def slow_bicubic(grid, rows, columns):
    """Resize (h, w, C) by Keys' kernel with a = -0.75 at pixel centres; beyond the border the border goes on."""

    def kernel(d):
        d = abs(d)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 if d < 2 else 0.0

    height, width = grid.shape[:2]
    out = np.zeros((rows, columns, grid.shape[2]))
    for r in range(rows):
        for c in range(columns):
            v, u = (r + 0.5) * height / rows - 0.5, (c + 0.5) * width / columns - 0.5
            for i in range(math.floor(v) - 1, math.floor(v) + 3):
                for j in range(math.floor(u) - 1, math.floor(u) + 3):
                    near = grid[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
                    out[r, c] += kernel(v - i) * kernel(u - j) * near
    return out


def slow_resize(pos_embed, old, new, class_token):
    """Resize (1, 1 + M, C) as the official code does, class token "first", or as it should."""
    entries, channels = list(pos_embed[0]), pos_embed.shape[-1]
    own = None if class_token is None else entries.pop({"first": 0, "middle": old[0] * old[1] // 2}[class_token])
    resized = list(slow_bicubic(np.reshape(entries, (*old, channels)), *new).reshape(-1, channels))
    if own is not None:
        resized.insert({"first": 0, "middle": new[0] * new[1] // 2}[class_token], own)
    return np.stack(resized)[None]


@pytest.mark.parametrize(
    ("options", "size", "grid"),
    [
        ({}, (16, 16), (4, 4)),
        ({"image_size": (13, 10), "stride": 3}, (13, 10), (4, 3)),  # patches overlap; no pixels are left over
        ({"divide_out": False}, (27, 13), (6, 3)),
        ({"pos_embed_class_token": "middle", "depth": 1}, (12, 23), (3, 5)),
        ({"class_token": False}, (21, 16), (5, 4)),
        ({"class_token": False, "rope": True}, (21, 16), (5, 4)),
        ({"local": "separable", "squeeze_excite": 4}, (27, 13), (6, 3)),
        ({"local": "inverted_residual", "local_ratio": 2}, (12, 23), (3, 5)),
        ({"local": "inverted_residual", "class_token": False, "squeeze_excite": 1}, (16, 16), (4, 4)),
    ],
    ids=[
        *("plain", "overlapping", "resized", "resized with the middle", "without class token", "rotary"),
        *("separable", "inverted residual", "inverted residual without class token"),
    ],
)
def test_model_equals_a_slow_loop(options, size, grid):
    graphdef, params, stats = split(small(**options))
    rng = np.random.default_rng(1)
    # Time steps near 0.7: the state forgets and remembers within a few tokens.
    wide = {
        name: 0.3 * rng.normal(size=a.shape) + (0 if name.endswith("dt_bias") else np.asarray(a, np.float64))
        for name, a in params.items()
    }
    stats = {name: rng.uniform(0.5, 1.5, a.shape) for name, a in stats.items()}
    x = rng.normal(size=(2, *size, 3))
    with jax.enable_x64(True):

        @jax.jit
        def both(p, stats, x):
            model = merge(graphdef, p, stats)
            return model(x), model.features(x)

        logits, maps = both(wide, stats, x)
    assert {a.dtype for a in (logits, *maps)} == {np.dtype("float64")}

    own = (4, 3) if "image_size" in options else (4, 4)
    class_token = options.get("class_token", True)
    pos_embed = wide["pos_embed"]
    if grid != own:
        at = options.get("pos_embed_class_token", "first") if class_token else None
        pos_embed = slow_resize(pos_embed, own, grid, at)
    depth = options.get("depth", 3)
    for i in range(2):
        wanted, streams = slow_vim(
            wide | stats,
            x[i],
            pos_embed,
            stride=options.get("stride", 4),
            class_token=class_token,
            halve=options.get("divide_out", True),
            rope=options.get("rope", False),
        )
        np.testing.assert_allclose(logits[i], wanted, rtol=0, atol=1e-11 * abs(wanted).max())
        assert len(streams) == depth
        # Of three blocks the first is in the first quarter, the second in the second, the third in the rest.
        for stage, end in zip(maps, [0, 1, 2, 2] if depth == 3 else [0, 0, 0, 0], strict=True):
            after = np.delete(streams[end], grid[0] * grid[1] // 2, axis=0) if class_token else streams[end]
            expected = after.reshape(*grid, 8)
            np.testing.assert_allclose(stage[i], expected, rtol=0, atol=1e-11 * abs(expected).max())


# Position embedding


@pytest.mark.parametrize("class_token", ["first", "middle", None])
@pytest.mark.parametrize(("old", "new"), [((14, 14), (27, 27)), ((5, 3), (2, 4))])
def test_position_embedding_is_resized_by_the_official_rule_or_the_right_one(class_token, old, new):
    extra = class_token is not None
    pos_embed = np.random.default_rng(0).normal(size=(1, old[0] * old[1] + extra, 2)).astype(np.float32)
    resized = np.asarray(resize_pos_embed(pos_embed, old, new, class_token=class_token))
    assert resized.dtype == np.float32
    chex.assert_trees_all_close(resized, np.float32(slow_resize(pos_embed, old, new, class_token)), atol=2e-6)


def test_the_class_tokens_entry_stays_where_it_is_told_to():
    pos_embed = np.arange(17.0, dtype=np.float32).reshape(1, 17, 1)
    first = resize_pos_embed(pos_embed, (4, 4), (8, 8), class_token="first")
    middle = resize_pos_embed(pos_embed, (4, 4), (8, 8), class_token="middle")
    assert (first[0, 0], middle[0, 32]) == (0, 8)
    chex.assert_trees_all_equal(np.asarray(resize_pos_embed(pos_embed, (4, 4), (4, 4))), pos_embed)


@pytest.mark.parametrize(
    ("shape", "class_token", "message"),
    [
        ((1, 17, 2), "last", "unknown class_token 'last'; allowed: 'first', 'middle'"),
        ((1, 16, 2), "first", r"pos_embed has shape \(1, 16, 2\); \(1, 17, channels\) are allowed for a grid of 4x4"),
        ((1, 17, 2), None, r"pos_embed has shape \(1, 17, 2\); \(1, 16, channels\) .* class_token=None"),
        ((17, 2), "first", r"pos_embed has shape \(17, 2\)"),
    ],
)
def test_a_position_embedding_that_does_not_fit_is_refused(shape, class_token, message):
    with pytest.raises(UserError, match=message):
        resize_pos_embed(np.zeros(shape, np.float32), (4, 4), (4, 4), class_token=class_token)


def test_weights_of_another_grid_need_image_size_or_a_resize():
    weights = to_torch(small())
    finer = small(stride=2)
    with pytest.raises(UserError, match=r"'pos_embed' is \(1, 17, 8\) instead of \(1, 50, 8\)\); .* and image_size"):
        from_torch(finer, weights)
    # With the size whose grid the weights have, the model resizes at run time; that is the resize done beforehand.
    at_run_time = small(stride=2, image_size=10)
    from_torch(at_run_time, weights)
    from_torch(finer, weights | {"pos_embed": np.asarray(resize_pos_embed(weights["pos_embed"], (4, 4), (7, 7)))})
    x = images(2, 16, 16, 3)
    chex.assert_trees_all_close(run(finer, x), run(at_run_time, x), rtol=1e-5, atol=1e-6)


# Inputs


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"images must be \(batch, height, width, 3\).*got float32 of shape \(2, 3, 16, 16\)"),
        ((16, 16, 3), "images must be"),
        ((1, 3, 16, 3), "image size 3x16 is too small: height and width must be at least 4"),
    ],
)
def test_wrong_images_are_refused(shape, message):
    model = nnx.eval_shape(small)
    for call in (model, model.features):
        with pytest.raises(UserError, match=message):
            call(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0 is not allowed: it must be 1 or more"),
        ({"image_size": 3}, "image_size is 3: give a side or (height, width) of at least patch_size=4"),
        ({"image_size": (16, 16, 3)}, "image_size is (16, 16, 3): give a side or (height, width)"),
        (
            {"pos_embed_class_token": "centre"},
            "pos_embed_class_token='centre' is not allowed: it must be 'first' or 'middle'",
        ),
        ({"img_size": 32}, "unknown option 'img_size' of model vim_t, did you mean 'image_size'?"),
        ({"rope": True}, "rope=True with class_token=True and width=8 is not allowed: it needs class_token=False"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        small(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# Modes


def test_drop_path_of_a_blocks_output_is_the_official_one():
    # There layer i drops what layer i - 1 returned, at entry i of these, and the model drops the last at the full rate.
    official = [0.0, *np.linspace(0, 0.23, 24)]
    wanted = [*official[1:24], 0.23]
    model = abstract_model("vim_t", drop_path_rate=0.23)
    np.testing.assert_allclose([block.drop_path.rate for block in model.blocks], wanted, atol=1e-12)


def test_training_mode_drops_whole_outputs_of_blocks():
    model = small(drop_path_rate=0.5, depth=2)
    x = images(16, 16, 16, 3)
    streams = jax.jit(lambda model, x, key=None: model.features(x, key=key)[1::2])
    _, whole = streams(model, x)
    model.train()
    with pytest.raises(ValueError, match="needs a random key"):
        model(x)
    first, second = streams(model, x, jax.random.key(0))
    dropped = np.asarray((second == first).all((1, 2, 3)))
    assert 0 < dropped.sum() < 16  # the first block is never dropped, the second half of the time
    np.testing.assert_allclose((second - first)[~dropped], 2 * (whole - first)[~dropped], rtol=1e-3, atol=1e-5)


# Precision


def test_bfloat16_keeps_the_residual_stream_in_float32():
    wide, half = small(num_classes=100), small(num_classes=100, dtype=jnp.bfloat16)
    both = jax.jit(lambda model, x: (model(x), model.features(x)))
    x = images(2, 32, 32, 3)
    (reference, _), (logits, maps) = both(wide, x), both(half, x)
    assert logits.dtype == jnp.bfloat16
    assert all(stage.dtype == jnp.float32 for stage in maps)
    assert (maps[-1] != maps[-1].astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    error = jnp.linalg.norm(logits.astype(jnp.float32) - reference) / jnp.linalg.norm(reference)
    assert 1e-5 < error < 0.02  # above zero: it did compute in bfloat16


# Recipes


@pytest.mark.parametrize("name", ["vim_t", "vim_s", "vim_b", "vim_t_stride8", "vim_s_stride8"])
def test_configs_are_valid_and_of_their_model(name):
    config = import_module(f"configs.{name}").get_config()
    config.validate()
    assert config.model.name == name


# Checkpoints of another grid

SMALL_BLOCKS = {"width": 8, "depth": 1, "d_state": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the parameters of a small model for images of 64x64, and the folder they are saved in."""
    _, params, stats = split(create_model("vim_t", **SMALL_BLOCKS, image_size=64, num_classes=3))
    folder = tmp_path_factory.mktemp("vim") / "saved"
    checkpoints.save_model(folder, params=params, batch_stats=stats, meta={})
    return params, folder


@pytest.mark.parametrize("place", ["first", "middle"])
def test_fine_tuning_at_another_stride_resizes_the_position_embedding(saved, caplog, place):
    params, folder = saved
    options = {"image_size": 64, "stride": 8, "num_classes": 3, "pos_embed_class_token": place}
    model = create_model("vim_t", **SMALL_BLOCKS, **options, pretrained=folder)
    assert "position embedding resized from 4x4 to 7x7 patches" in caplog.text
    expected = resize_pos_embed(params["pos_embed"], (4, 4), (7, 7), class_token=place)
    chex.assert_trees_all_equal(model.pos_embed[...], expected)
    chex.assert_trees_all_equal(model.head.kernel[...], params["head.kernel"])


def test_the_same_grid_is_left_alone(saved, caplog):
    params, folder = saved
    model = create_model("vim_t", **SMALL_BLOCKS, image_size=64, num_classes=3, pretrained=folder)
    chex.assert_trees_all_equal(model.pos_embed[...], params["pos_embed"])
    assert not caplog.text


def test_a_backbone_takes_a_classifier_without_its_class_token(saved):
    params, folder = saved
    options = {"image_size": 64, "num_classes": 0, "class_token": False}
    model = create_model("vim_t", **SMALL_BLOCKS, **options, pretrained=folder)
    chex.assert_trees_all_equal(model.pos_embed[...], params["pos_embed"][:, 1:])  # as the official backbone does
