"""Our EfficientVMamba against recorded outputs of the official code; tests/golden/README.md has data and limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_outputs import (
    arrays,
    assert_float32,
    assert_float64,
    assert_near,
    assert_part,
    channels_last,
    facts,
    official,
    pyramid_maps,
)

from evmamba_jax.layers.inverted_residual import InvertedResidual
from evmamba_jax.layers.patches import PatchMerging
from evmamba_jax.layers.projections import Linear
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.efficientvmamba import EVSSBlock
from evmamba_jax.weights import efficientvmamba as tables
from evmamba_jax.weights import layers
from pallas_kernels import ATROUS, selective_scan


def every_map(model, images):
    """Return the output of every part; the official stages 3 and 4 are flat and count their blocks from 1."""
    return pyramid_maps(model, images, lambda i, j: f"layers.{i}.blocks.{j}" if i < 2 else f"layers.{i}.{j + 1}")


@pytest.mark.parametrize("name", ["evmamba_t", "evmamba_s"])
def test_float32_logits_stages_and_blocks(name):
    assert_float32(name, every_map)


def test_float64_logits_and_gradients():
    assert_float64("evmamba_t")


def test_an_odd_rectangle_whose_every_grid_is_padded():
    assert_float64("evmamba_t", "efficientvmamba_odd", width=8, depths=(1, 1, 1, 1), num_classes=10)


def test_float64_logits_of_the_width_that_its_yaml_misprints():
    with jax.enable_x64(True):
        model, images = official("evmamba_s", np.float64)
        logits = jax.jit(lambda model, images: model(images))(model, images)
        assert_near(logits, arrays("efficientvmamba_small")["logits_f64"], 1e-8, what="logits")


def merging_to_ten(rngs):
    """Our downsampling always doubles the channels; the recorded one maps 6 to 10."""
    part = PatchMerging(6, rngs=rngs)
    part.reduction = Linear(24, 10, use_bias=False, rngs=rngs)
    return part


WIDTH = 24
GRIDS = [(6, 4), (7, 5), (8, 7), (5, 6)]
EVSS_OPTIONS = {"d_state": 16, "ssm_ratio": 2.0, "drop_path": 0.0, "dtype": None}
PARTS = {
    **{
        f"ss2d_{height}x{width}": (lambda rngs: SS2D(WIDTH, ATROUS, rngs=rngs), layers.ss2d(sets=4))
        for height, width in GRIDS
    },
    "bi_attn": (lambda rngs: SqueezeExcite(WIDTH, norm=True, act="gelu", rngs=rngs), tables.CHANNEL_GATE),
    "block": (lambda rngs: EVSSBlock(WIDTH, **EVSS_OPTIONS, rngs=rngs), tables.EVSS_BLOCK),
    "inverted_residual": (
        lambda rngs: InvertedResidual(8, squeeze_excite=8, rngs=rngs),
        tables.INVERTED_RESIDUAL,
    ),
    "patch_merging_odd": (merging_to_ten, layers.PATCH_ROWS[PatchMerging]),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_all_their_gradients(case):
    build, rows = PARTS[case]
    to_ours = channels_last if case == "inverted_residual" else np.asarray
    assert_part("op_efficientvmamba", case, build, rows, to_ours=to_ours)


SCANS = facts("op_selective_scan")["cases"]


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
@pytest.mark.parametrize("case", SCANS)
def test_selective_scan_and_all_its_gradients(case, implementation):
    golden = {key: a for key, a in arrays("op_selective_scan").items() if key.startswith(f"{case}/")}
    inputs = {key.split("/")[-1]: to_ours(key, a) for key, a in golden.items() if "/in/" in key}
    options = {"delta_softplus": SCANS[case]["settings"]["delta_softplus"], "implementation": implementation}

    def scan(inputs):
        z = inputs.get("z")
        given = {name: a for name, a in inputs.items() if name != "z"}
        y, last_state = selective_scan(**given, **options, return_final_state=True)
        return (y if z is None else y * jax.nn.silu(z)), last_state

    @jax.jit
    def run(inputs, cot):
        y, vjp, last_state = jax.vjp(scan, inputs, has_aux=True)
        return y, last_state, vjp(cot)[0]

    y, last_state, gradients = run(inputs, to_ours("y", golden[f"{case}/cot/y"]))
    assert_near(y, to_ours("y", golden[f"{case}/out/y"]), 5e-5, what="y")
    assert_near(last_state, golden[f"{case}/out/last_state"], 5e-5, what="last_state")
    for name, gradient in gradients.items():
        assert_near(gradient, to_ours(name, golden[f"{case}/grad/{name}"]), 5e-4, what=name)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_the_atrous_orders_move_the_same_pixels(height, width):
    golden = arrays("op_efficientvmamba")
    scan, merge = (f"atrous_{what}_{height}x{width}" for what in ("scan", "merge"))
    image = golden[f"{scan}/in/x"].transpose(0, 2, 3, 1)
    sequences = [np.asarray(order.read(jnp.asarray(image))).swapaxes(1, 2) for order in ATROUS]
    chex.assert_trees_all_equal(np.stack(sequences, 1), golden[f"{scan}/out/y"])
    written = [
        order.write(jnp.asarray(golden[f"{merge}/in/ys"][:, k].swapaxes(1, 2)), height, width)
        for k, order in enumerate(ATROUS)
    ]
    chex.assert_trees_all_equal(
        np.asarray(sum(written)), golden[f"{merge}/out/y"].reshape(2, 3, height, width).transpose(0, 2, 3, 1)
    )


def to_ours(key, array):
    """Move the length behind the batch: (B, D, L) to (B, L, D), (B, K, N, L) to (B, L, K, N)."""
    return np.moveaxis(array, -1, 1) if array.ndim > 2 else array
