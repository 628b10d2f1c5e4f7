"""MSVMamba: version 2 against slow loops, both versions' sizes, initial values, inputs and precision.

Version 1 is compared with recorded outputs of the official code in tests/weights; of version 2 there are none.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import weights
from scipy.special import erf, expit

from evmamba_jax import create_model
from evmamba_jax.arrays import split
from evmamba_jax.errors import UserError
from evmamba_jax.layers.block import Block
from evmamba_jax.models import abstract_model
from evmamba_jax.models.msvmamba import MS2D, ConvFFN
from evmamba_jax.weights import from_torch
from evmamba_jax.weights import msvmamba as tables
from evmamba_jax.weights.convert import fill_rows

# The written definition, in float64 and with the official names, layouts and (channels aside) loops over pixels.


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].reshape(len(w[f"{name}.weight"]), -1).T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def conv(w, name, x, stride=1):
    """Convolve x (H, W, C), padded by half the kernel; depthwise when each kernel has one input channel."""
    kernel = w[f"{name}.weight"]  # (O, I, k, k)
    k = kernel.shape[-1]
    x = np.pad(x, ((k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n in x.shape[:2])
    y = np.zeros((rows, columns, len(kernel)))
    for i in range(rows):
        for j in range(columns):
            window = x[i * stride : i * stride + k, j * stride : j * stride + k]
            y[i, j] = np.einsum("hwc,cihw->c" if kernel.shape[1] == 1 else "hwi,oihw->o", window, kernel)
    return y + w[f"{name}.bias"]


def silu(x):
    return x * expit(x)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def selective_scan(w, k, tokens):
    """Scan tokens (L, E) with set k of the stacked parameters of a state of size 1."""
    inner, rank = w["dt_projs_weight"].shape[1:]
    a, d = -np.exp(w["A_logs"].reshape(-1, inner)[k]), w["Ds"].reshape(-1, inner)[k]
    h, ys = np.zeros(inner), []
    for u in tokens:
        projected = w["x_proj_weight"][k] @ u
        step = np.log1p(np.exp(w["dt_projs_weight"][k] @ projected[:rank] + w["dt_projs_bias"][k]))
        h = np.exp(step * a) * h + step * projected[rank] * u
        ys.append(projected[rank + 1] * h + d * u)
    return np.array(ys)


def upsample(x, height, width, version):
    """Resize by the half-pixel rule, between two neighbours (version 1), or by the cell a pixel is in (version 2)."""
    y = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            if version == 2:
                y[i, j] = x[i * x.shape[0] // height, j * x.shape[1] // width]
                continue
            for row, of_row in neighbours(i, x.shape[0], height):
                for column, of_column in neighbours(j, x.shape[1], width):
                    y[i, j] += of_row * of_column * x[row, column]
    return y


def neighbours(i, old, new):
    place = max((i + 0.5) * old / new - 0.5, 0)
    below = int(place)
    return [(below, 1 - place + below), (min(below + 1, old - 1), place - below)]


def ms2d(w, x, *, version, gate, leak):
    x = linear(w, "in_proj", x)
    if gate:
        x, z = np.split(x, 2, axis=-1)
    full, low = silu(conv(w, "conv2d", x)), silu(conv(w, "conv2d_b1", x, stride=2))
    height, width = low.shape[:2]
    pixels = [(i, j) for i in range(height) for j in range(width)]
    by_columns = sorted(pixels, key=lambda pixel: pixel[::-1])
    walks = [pixels[::-1], by_columns, by_columns[::-1]]
    walk = [pixel for walk in walks for pixel in walk]
    of_low, of_full = (0, 1) if version == 1 else (1, 0)

    outputs = [selective_scan(w, of_low, np.array([low[pixel] for pixel in a])) for a in ([walk] if leak else walks)]
    y_low, y_full = np.zeros_like(low), selective_scan(w, of_full, full.reshape(-1, full.shape[2])).reshape(full.shape)
    for pixel, y in zip(walk, np.concatenate(outputs), strict=True):
        y_low[pixel] += layer_norm(w, "out_norm", y) if version == 1 else y
    if version == 1:
        y = layer_norm(w, "out_norm", y_full) + upsample(y_low, *full.shape[:2], 1)
    else:
        y = layer_norm(w, "out_norm", y_full + upsample(y_low, *full.shape[:2], 2))
    y = y * expit(linear(w, "se.fc.2", np.maximum(linear(w, "se.fc.0", y.mean((0, 1))), 0)))
    return linear(w, "out_proj", y * silu(z) if gate else y)


def block(w, x, *, gate):
    """One block of version 2."""
    x = x + ms2d(part(w, "op"), layer_norm(w, "norm", x), version=2, gate=gate, leak=True)
    h = linear(w, "convFFN.linear1", x)
    return x + layer_norm(w, "norm2", linear(w, "convFFN.linear2", gelu(h + conv(w, "convFFN.dwc", h))))


def logits(w, x, *, gate):
    """The whole of version 2, one block a stage."""
    x = layer_norm(w, "patch_embed.2", conv(w, "patch_embed.0", x, stride=2))
    x = layer_norm(w, "patch_embed.7", conv(w, "patch_embed.5", gelu(x), stride=2))
    for i in range(4):
        x = block(part(w, f"layers.{i}.blocks.0"), x, gate=gate)
        if i < 3:
            x = conv(w, f"layers.{i}.downsample.1", x, stride=2)
            x = layer_norm(w, f"layers.{i}.downsample.3", x)
    return linear(w, "classifier.head", layer_norm(w, "classifier.norm", x).mean((0, 1)))


def part(w, name):
    return {key.removeprefix(f"{name}."): array for key, array in w.items() if key.startswith(f"{name}.")}


# Official names and shapes.


def named(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def norm_shapes(width):
    return {"weight": (width,), "bias": (width,)}


def conv_shapes(out, in_, size):
    return {"weight": (out, in_, size, size), "bias": (out,)}


def ms2d_shapes(width, inner, gate):
    rank = math.ceil(width / 16)
    return {
        "x_proj_weight": (2, rank + 2, inner),
        "dt_projs_weight": (2, inner, rank),
        "dt_projs_bias": (2, inner),
        "A_logs": (2 * inner, 1),
        "Ds": (2 * inner,),
        **named("out_norm", norm_shapes(inner)),
        "se.fc.0.weight": (inner // 8, inner),
        "se.fc.2.weight": (inner, inner // 8),
        "in_proj.weight": ((2 if gate else 1) * inner, width),
        **named("conv2d", conv_shapes(inner, 1, 3)),
        **named("conv2d_b1", conv_shapes(inner, 1, 7)),
        "out_proj.weight": (width, inner),
    }


def block_shapes(width, gate):
    return {
        **named("norm", norm_shapes(width)),
        **named("op", ms2d_shapes(width, width, gate)),
        **named("convFFN.linear1", conv_shapes(4 * width, width, 1)),
        **named("convFFN.dwc", conv_shapes(4 * width, 1, 3)),
        **named("convFFN.linear2", conv_shapes(width, 4 * width, 1)),
        **named("norm2", norm_shapes(width)),
    }


def model_shapes(width, classes, gate):
    shapes = {
        **named("patch_embed.0", conv_shapes(width // 2, 3, 3)),
        **named("patch_embed.2", norm_shapes(width // 2)),
        **named("patch_embed.5", conv_shapes(width, width // 2, 3)),
        **named("patch_embed.7", norm_shapes(width)),
    }
    for i in range(4):
        shapes |= named(f"layers.{i}.blocks.0", block_shapes(width * 2**i, gate))
        if i < 3:
            shapes |= named(f"layers.{i}.downsample.1", conv_shapes(width * 2 ** (i + 1), width * 2**i, 3))
            shapes |= named(f"layers.{i}.downsample.3", norm_shapes(width * 2 ** (i + 1)))
    shapes |= named("classifier.norm", norm_shapes(8 * width))
    return shapes | {"classifier.head.weight": (classes, 8 * width), "classifier.head.bias": (classes,)}


def wide(shapes):
    return {name: array.astype(np.float64) for name, array in weights(shapes).items()}


def filled(build, rows, w):
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    fill_rows(module, rows, w)
    module.eval()
    return module


def applied(module, x):
    """Return the module's output for one sample, in float64."""
    run = jax.jit(lambda module, x: module(x))
    y = run(module, x[None])[0]
    assert y.dtype == np.float64
    return np.asarray(y)


@pytest.mark.parametrize(
    ("version", "gate", "leak", "size"),
    [
        (2, False, True, (6, 4)),
        (2, True, True, (5, 7)),
        (2, False, False, (4, 5)),
        (1, True, False, (5, 6)),
        (1, False, True, (1, 3)),
    ],
)
def test_the_operator_equals_slow_loops(version, gate, leak, size):
    w = wide(ms2d_shapes(16, 32, gate))
    x = np.random.default_rng(0).normal(size=(*size, 16))
    options = {"version": version, "gate": gate, "ssm_ratio": 2.0, "leak_state": leak}
    with jax.enable_x64(True):
        y = applied(filled(lambda rngs: MS2D(16, **options, rngs=rngs), tables.MS2D, w), x)
    chex.assert_trees_all_close(y, ms2d(w, x, version=version, gate=gate, leak=leak), rtol=1e-10, atol=1e-10)
    # Whether the state runs from one direction into the next is seen.
    assert np.abs(y - ms2d(w, x, version=version, gate=gate, leak=not leak)).max() > 1e-5 * y.std()


@pytest.mark.parametrize(("gate", "size"), [(False, (5, 4)), (True, (4, 3))])
def test_the_block_of_version_2_equals_slow_loops(gate, size):
    def build(rngs):
        mixer = MS2D(16, version=2, ssm_ratio=1.0, gate=gate, rngs=rngs)
        ffn = ConvFFN(16, 64, rngs=rngs)
        return Block(16, mixer, ffn, drop_path=0.0, post_norm=True, dtype=None, rngs=rngs)

    w = wide(block_shapes(16, gate))
    x = np.random.default_rng(1).normal(size=(*size, 16))
    with jax.enable_x64(True):
        y = applied(filled(build, tables.BLOCK, w), x)
    chex.assert_trees_all_close(y, block(w, x, gate=gate), rtol=1e-10, atol=1e-10)


def test_the_model_of_version_2_equals_slow_loops():
    """An odd rectangle, whose four maps are 5x6, 3x3, 2x2 and 1x1; the weights come under their official names."""
    w = wide(model_shapes(16, 5, gate=True))
    image = np.random.default_rng(2).normal(size=(17, 22, 3))
    with jax.enable_x64(True):
        model = abstract_model("msvmamba_b_v2", width=16, depths=(1, 1, 1, 1), num_classes=5)
        from_torch(model, w)
        y = applied(model, image)
    chex.assert_trees_all_close(y, logits(w, image, gate=True), rtol=1e-9, atol=1e-9)


# Initial values


@pytest.fixture(scope="module")
def fresh():
    _, params, _ = split(create_model("msvmamba_n", depths=(1, 1, 0, 0), num_classes=20, rngs=nnx.Rngs(3)))
    return {name: np.asarray(array, np.float64) for name, array in params.items()}


def selected(arrays, *endings):
    found = {name: array for name, array in arrays.items() if name.endswith(endings)}
    assert found
    return found


def test_scan_parameters_start_as_mambas(fresh):
    assert all((a == 0).all() for a in selected(fresh, "scan.A_log").values())  # log(1), the only state
    assert all((d == 1).all() for d in selected(fresh, "scan.D").values())
    step = np.concatenate([np.log1p(np.exp(b)).ravel() for b in selected(fresh, "scan.dt_bias").values()])
    assert 0.00099 < step.min() < 0.0012
    assert 0.09 < step.max() < 0.1001
    deciles = np.quantile(np.log(step), np.linspace(0, 1, 11))  # evenly spaced
    chex.assert_trees_all_close(deciles, np.linspace(np.log(0.001), np.log(0.1), 11), atol=0.25)
    for w in selected(fresh, "scan.x_proj", "scan.dt_proj").values():  # (2, in, out)
        assert_uniform(w, w.shape[1] ** -0.5)


def assert_uniform(array, bound):
    assert abs(array).max() <= bound * (1 + 1e-6)
    assert array.size < 300 or abs(array).max() > 0.97 * bound
    if array.size > 3000:
        np.testing.assert_allclose(array.std(), bound / math.sqrt(3), rtol=0.05)


def test_linear_layers_are_normal_and_convolutions_uniform(fresh):
    linears = ("in_proj.kernel", "out_proj.kernel", "se.reduce.kernel", "se.expand.kernel", "head.kernel")
    for name, w in selected(fresh, *linears).items():
        np.testing.assert_allclose(w.std(), 0.02, rtol=0.25 if w.size < 1000 else 0.05, err_msg=name)
        assert abs(w).max() > 0.02 * math.sqrt(3), name  # not uniform of that deviation
    convolutions = ("conv2d.kernel", "conv2d_low.kernel", "pw1.kernel", "dw.kernel", "pw2.kernel")
    for name, w in selected(fresh, *convolutions).items():
        bound = math.prod(w.shape[:-1]) ** -0.5
        assert_uniform(w, bound)
        assert_uniform(fresh[name.replace("kernel", "bias")], bound)
        assert (fresh[name.replace("kernel", "bias")] != 0).any()


# Inputs and options


@pytest.mark.parametrize(
    ("name", "size", "first"),
    [
        ("msvmamba_n", (4, 4), (1, 1)),
        ("msvmamba_n", (33, 61), (8, 15)),
        ("msvmamba_t_v2", (1, 1), (1, 1)),
        ("msvmamba_t_v2", (33, 61), (9, 16)),
    ],
)
@pytest.mark.parametrize("out_norms", [False, True])
def test_any_size_gives_maps_of_half_the_size_each(name, size, first, out_norms):
    model = abstract_model(name, width=16, depths=(1, 1, 1, 1), out_norms=out_norms)
    maps = nnx.eval_shape(lambda model, x: model.features(x), model, jnp.zeros((2, *size, 3)))
    h, w = first
    for i, stage in enumerate(maps):
        chex.assert_shape(stage, (2, h, w, 16 * 2**i))
        h, w = -(-h // 2), -(-w // 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version=3 is not allowed: it must be 1 or 2"),
        ({"version": "v2"}, "version='v2' is not allowed"),
        ({"depths": (2, 2, 9)}, r"depths must name the blocks of four stages.*\(2, 2, 9\)"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        create_model("msvmamba_n", **options)


def test_images_smaller_than_a_patch_are_refused():
    model = abstract_model("msvmamba_n", width=16, depths=(1, 1, 1, 1))
    with pytest.raises(UserError, match="image size 3x32 is too small: height and width must be at least 4"):
        model(jnp.zeros((1, 3, 32, 3)))


# Precision

ONE_BLOCK = {"width": 32, "depths": (1, 0, 0, 0), "num_classes": 10}


@pytest.mark.parametrize("name", ["msvmamba_n", "msvmamba_t_v2"])
def test_bfloat16_stays_within_two_per_cent(name):
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    run = jax.jit(lambda model, x: model(x))
    y, reference = (run(create_model(name, **ONE_BLOCK, dtype=dtype), x) for dtype in (jnp.bfloat16, None))
    assert y.dtype == jnp.bfloat16
    error = jnp.linalg.norm(y.astype(jnp.float32) - reference) / jnp.linalg.norm(reference)
    assert 1e-5 < error < 0.02  # above zero: it did compute in bfloat16
