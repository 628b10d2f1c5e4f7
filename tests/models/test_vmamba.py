"""VMamba: sizes, the options of its studies, inputs and errors. Parity is in tests/weights."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from evmamba_jax import create_model
from evmamba_jax.arrays import merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.layers.initializers import SCAN_INITS
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models import abstract_model
from evmamba_jax.models.vmamba import SCANS
from pallas_kernels import Chain, Order

SMALL = {"width": 8, "depths": (1, 1, 1, 1), "num_classes": 5, "d_state": 2}


@functools.cache
def small(name="vmamba_t", **options):
    return create_model(name, **SMALL, **options)


# Initial values: the three choices of the paper's table 11, each against its distribution.


def scan_parameters(init):
    """Return A_log (512, 4), D, dt_proj of rank 16 and dt_bias of a fresh operator, of its first set."""
    module = SS2D(256, (Order(),), d_state=4, init=SCAN_INITS[init], rngs=nnx.Rngs(0))
    parameters = (module.scan.A_log, module.scan.D, module.scan.dt_proj, module.scan.dt_bias)
    return [np.asarray(p[0], np.float64) for p in parameters]


def normal(values, deviation):
    """Check the deviation, the mean, and that two thirds lie within one deviation, as of no uniform distribution."""
    n = values.size
    np.testing.assert_allclose(values.std(), deviation, rtol=4 / math.sqrt(n))
    np.testing.assert_allclose(values.mean(), 0, atol=4 * deviation / math.sqrt(n))
    np.testing.assert_allclose((abs(values) < deviation).mean(), 0.683, atol=3 / math.sqrt(n))


def uniform(values, low, high):
    """Check that the deciles are evenly spaced."""
    slack = 1e-6 * (high - low)  # of float32
    assert low - slack <= values.min() <= values.max() <= high + slack
    deciles = np.quantile(values, np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(low, high, 11), atol=(high - low) * 2 / math.sqrt(values.size))


def test_initial_values_of_mamba():
    a_log, d, dt_proj, dt_bias = scan_parameters("mamba")
    np.testing.assert_allclose(a_log, np.tile(np.log([1, 2, 3, 4]), (512, 1)), atol=1e-6)
    assert (d == 1).all()
    uniform(dt_proj, -0.25, 0.25)
    uniform(np.log(np.log1p(np.exp(dt_bias))), math.log(0.001), math.log(0.1))


def test_random_initial_values():
    a_log, d, dt_proj, dt_bias = scan_parameters("random")
    normal(a_log, 1.0)
    assert (d == 1).all()
    normal(dt_proj, 0.1)
    normal(dt_bias, 0.1)


def test_initial_values_of_zero():
    a_log, d, dt_proj, dt_bias = scan_parameters("zero")
    assert (a_log == 0).all()
    assert (d == 1).all()
    uniform(dt_proj, 0, 0.1)
    uniform(dt_bias, 0, 0.1)


# SS2D against loops over pixels in NumPy, written from the formulas.

ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def slow_scan(p, k, tokens):
    """Scan tokens (L, E), one by one, with set k of the parameters."""
    rank, state = p["scan.dt_proj"].shape[1], p["scan.A_log"].shape[2]
    h, y = np.zeros((tokens.shape[1], state)), np.zeros_like(tokens)
    for t, x in enumerate(tokens):
        dt, b, c = np.split(x @ p["scan.x_proj"][k], [rank, rank + state])
        delta = np.log1p(np.exp(dt @ p["scan.dt_proj"][k] + p["scan.dt_bias"][k]))
        decay = np.exp(-delta[:, None] * np.exp(p["scan.A_log"][k]))
        h = decay * h + (delta * x)[:, None] * b
        y[t] = h @ c + p["scan.D"][k] * x
    return y


def slow_orders(p, x, walks):
    """Scan one image (H, W, E) along walks of flat pixel indices, -1 for padding, and add up."""
    pixels = np.concatenate([x.reshape(-1, x.shape[-1]), np.zeros((1, x.shape[-1]))])
    y = np.zeros_like(pixels)
    for k, walk in enumerate(walks):
        for pixel, out in zip(walk, slow_scan(p, k, pixels[walk]), strict=True):
            y[pixel] += out
    return y[:-1].reshape(x.shape)


def slow_cascade(p, x, turn):
    """Rows there and back with sets 0 and 1, then the columns of the result with 2 and 3; each pass of a norm.

    ``turn`` is the step by which what the way back gives is read: 1 as the official code has it, -1 pixel by pixel.
    """
    for first in (0, 2):
        x = normalised(x)
        x = np.stack([slow_scan(p, first, line) + slow_scan(p, first + 1, line[::-1])[::turn] for line in x])
        x = x.swapaxes(0, 1)  # after the rows the columns; after these, back
    return x


def slow_ss2d(p, images, act, scan):
    """The whole operator on (B, H, W, C); ``scan`` maps an image of inner channels to another."""
    x = images @ p["in_proj.kernel"]
    x, z = np.split(x, [p["scan.D"].shape[1]], -1)
    if "conv2d.kernel" in p:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = sum(
            padded[:, i : i + x.shape[1], j : j + x.shape[2]] * p["conv2d.kernel"][i, j, 0]
            for i in range(3)
            for j in range(3)
        ) + p.get("conv2d.bias", 0)
    y = np.stack([scan(image) for image in ACTS[act](x)])
    y = normalised(y) * p["out_norm.scale"] + p["out_norm.bias"]
    return (y * ACTS[act](z) if z.size else y) @ p["out_proj.kernel"]


GRID = (3, 4)
BY_ROWS = list(range(12))
BY_COLUMNS = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
OWN = (
    Chain((Order(column_major=True), Order(reverse=True))),
    Order(origin=(1, 0), step=(2, 1), column_major=True),
    Order(origin=(0, 1), step=(1, 2), column_major=True),
)
OWN_WALKS = [BY_COLUMNS + BY_ROWS[::-1], [4, -1, 5, -1, 6, -1, 7, -1], [1, 5, 9, 3, 7, 11]]


@pytest.mark.parametrize(
    ("scan", "walks", "options"),
    [
        ("cross", [BY_ROWS, BY_COLUMNS, BY_ROWS[::-1], BY_COLUMNS[::-1]], {"gate": True, "conv_bias": True}),
        ("unidirectional", [BY_ROWS] * 4, {"act": "relu"}),
        ("bidirectional", [BY_ROWS] * 2 + [BY_ROWS[::-1]] * 2, {"act": "gelu", "gate": True}),
        ("cascade", 1, {}),
        ("cascade_aligned", -1, {}),
        ("cascade", 1, {"gate": True, "conv": False}),
        (OWN, OWN_WALKS, {"conv": False}),
    ],
    ids=["cross", "unidirectional", "bidirectional", "cascade", "cascade aligned", "cascade without conv", "own"],
)
def test_scan_patterns_equal_a_slow_loop(scan, walks, options):
    options = {"gate": False, "conv_bias": False, "act": "silu"} | options
    # Step sizes of "zero" are near 0.7, so that the state forgets and remembers within a few pixels.
    orders = SCANS[scan] if isinstance(scan, str) else scan
    module = SS2D(4, orders, d_state=3, **options, init=SCAN_INITS["zero"], rngs=nnx.Rngs(0))
    graphdef, params, stats = split(module)
    assert params["scan.A_log"].shape == (4 if isinstance(walks, int) else len(walks), 8, 3)
    rng = np.random.default_rng(1)
    wide = {n: np.asarray(a, np.float64) + 0.3 * rng.normal(size=a.shape) for n, a in params.items()}
    images = rng.normal(size=(2, *GRID, 4))
    with jax.enable_x64(True):
        actual = jax.jit(lambda p, x: merge(graphdef, p, stats)(x))(wide, images)
        assert actual.dtype == jnp.float64
    wanted = slow_ss2d(
        wide,
        images,
        options["act"],
        lambda x: slow_cascade(wide, x, walks) if isinstance(walks, int) else slow_orders(wide, x, walks),
    )
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-11 * abs(wanted).max())


def test_the_model_hands_its_options_on():
    def build():
        return create_model("vmamba_t", **SMALL, scan=OWN, act="relu", conv=False, gate=True, mlp_ratio=0)

    block = nnx.eval_shape(build).stages[3].blocks[0]
    assert block.mixer.orders == OWN
    assert block.mixer.act is nnx.relu
    assert block.mixer.conv2d is None
    assert block.mixer.gate
    assert block.mlp is None
    for name, orders in SCANS.items():
        named = nnx.eval_shape(lambda name=name: create_model("vmamba_t", **SMALL, scan=name))
        assert named.stages[0].blocks[0].mixer.orders == orders
        assert named.stages[0].blocks[0].mixer.scan.D.shape == (4, 8)
    zero = small(init="zero")
    assert (zero.stages[0].blocks[0].mixer.scan.A_log[...] == 0).all()


# The backbone for detection and segmentation


def test_a_backbone_gives_normalised_maps_and_has_no_head():
    model = small(out_norms=True)
    maps = jax.jit(lambda model, x: model.features(x))(model, jax.random.normal(jax.random.key(0), (2, 32, 64, 3)))
    for i, stage in enumerate(maps):
        chex.assert_shape(stage, (2, 8 // 2**i, 16 // 2**i, 8 * 2**i))
        np.testing.assert_allclose(stage.mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(stage.var(-1), 1, atol=1e-2)  # less than 1 by epsilon
    names = split(model).params
    assert not [name for name in names if name.startswith(("norm.", "head."))]
    assert [n for n in names if n.startswith("out_norms.") and n.endswith("scale")] == [
        f"out_norms.{i}.scale" for i in range(4)
    ]
    with pytest.raises(UserError, match=r"built with out_norms=True, a backbone without a head: call its features\(\)"):
        model(jnp.zeros((1, 32, 32, 3)))


def test_the_norms_are_the_only_difference_of_a_backbone():
    plain, backbone = small(), small(out_norms=True)
    graphdef, params, stats = split(backbone)
    shared = {name: a for name, a in split(plain).params.items() if name in params}
    assert set(params) - set(shared) == {f"out_norms.{i}.{kind}" for i in range(4) for kind in ("scale", "bias")}
    x = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    features = jax.jit(lambda model, x: model.features(x))
    raw = features(plain, x)
    wanted = [normalised(np.asarray(stage, np.float64)) for stage in raw]
    actual = features(merge(graphdef, {**params, **shared}, stats), x)
    chex.assert_trees_all_close(actual, jax.tree.map(np.float32, wanted), atol=1e-4)


# Inputs


@pytest.mark.parametrize(
    ("name", "size", "first"),
    [
        ("vmamba_t", (1, 1), (1, 1)),
        ("vmamba_t", (5, 3), (2, 1)),
        ("vmamba_t", (33, 62), (9, 16)),  # overlapping stem: rounds up twice
        ("vmamba_t_v0", (4, 4), (1, 1)),
        ("vmamba_t_v0", (35, 64), (8, 16)),  # patches: what is left of the last one is dropped
    ],
)
def test_any_size_gives_maps_of_half_the_size_each(name, size, first):
    x = jax.random.normal(jax.random.key(1), (2, *size, 3))
    logits, maps = jax.eval_shape(lambda model, x: (model(x), model.features(x)), small(name), x)
    h, w = first
    for i, stage in enumerate(maps):
        chex.assert_shape(stage, (2, h, w, 8 * 2**i))
        h, w = -(-h // 2), -(-w // 2)
    chex.assert_shape(logits, (2, 5))


def test_maps_of_one_pixel_are_finite():
    chex.assert_tree_all_finite(jax.jit(lambda model, x: model(x))(small(), jnp.ones((2, 1, 1, 3))))


def test_images_smaller_than_a_patch_are_refused():
    model = abstract_model("vmamba_t_v0", **SMALL)
    with pytest.raises(UserError, match="image size 3x32 is too small: height and width must be at least 4"):
        model(jnp.zeros((1, 3, 32, 3)))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": Order()}, "scan is Order(origin=(0, 0), "),
        ({"scan": ()}, "scan is (); allowed: 'cross', "),
        ({"scan": ("cross",)}, "scan is ('cross',); allowed: 'cross', "),
        ({"scan": "cros"}, "unknown scan 'cros', did you mean 'cross'?; allowed: 'cross', 'unidirectional', "),
        ({"act": "swish"}, "act='swish' is not allowed: it must be 'silu', 'gelu' or 'relu'"),
        ({"init": "zeros"}, "init='zeros' is not allowed: it must be 'mamba', 'random' or 'zero'"),
        ({"depths": (2, 2, 9)}, "depths must name the blocks of four stages, e.g. (2, 2, 4, 2); got (2, 2, 9)"),
        ({"scans": "cross"}, "unknown option 'scans' of model vmamba_t, did you mean 'scan'?"),
    ],
)
def test_wrong_options_are_refused_with_the_nearest(options, message):
    with pytest.raises(UserError) as caught:
        create_model("vmamba_t", **{**SMALL, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
