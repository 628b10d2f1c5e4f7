"""Our MSVMamba against recorded outputs of the official code; tests/golden/README.md has data and limits."""

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
    pyramid_maps,
)

from evmamba_jax.layers.block import Block
from evmamba_jax.layers.resize import resize
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.models.msvmamba import LOW, MS2D, ConvFFN
from evmamba_jax.weights import msvmamba as tables
from pallas_kernels import Chain

WIDTH = 16


def test_float32_logits_stages_and_blocks():
    assert_float32("msvmamba_n", pyramid_maps)


def test_float64_logits_and_gradients():
    assert_float64("msvmamba_n")


def test_version_2_on_an_odd_rectangle():
    assert_float64("msvmamba_t_v2", "msvmamba_v2", width=16, depths=(1, 0, 1, 0), num_classes=10)


def test_version_2_with_its_gate_on_an_odd_rectangle():
    assert_float64("msvmamba_b_v2", "msvmamba_v2_gated", width=16, depths=(0, 1, 0, 1), num_classes=10)


def mixer(rngs):
    return MS2D(WIDTH, version=1, ssm_ratio=2.0, gate=True, rngs=rngs)


def block(rngs):
    ffn = ConvFFN(WIDTH, 2 * WIDTH, rngs=rngs)
    return Block(WIDTH, mixer(rngs), ffn, drop_path=0.0, dtype=None, rngs=rngs)


PARTS = {
    "ss2d_8x8": (mixer, tables.MS2D, np.asarray),
    "ss2d_5x6": (mixer, tables.MS2D, np.asarray),
    "conv_ffn": (lambda rngs: ConvFFN(8, 16, rngs=rngs), tables.CONV_FFN, channels_last),
    "se": (lambda rngs: SqueezeExcite(32, use_bias=False, rngs=rngs), tables.SQUEEZE_EXCITE, channels_last),
    "block": (block, tables.BLOCK, np.asarray),  # on a grid of 9x7
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_all_their_gradients(case):
    build, rows, to_ours = PARTS[case]
    assert_part("op_msvmamba", case, build, rows, to_ours=to_ours)


GRIDS = ["9x7", "8x8", "5x6"]


@pytest.mark.parametrize("grid", GRIDS)
def test_bilinear_upsampling_and_its_gradient(grid):
    golden = {key.split("/", 1)[1]: a for key, a in arrays("op_msvmamba").items() if key.startswith(f"bilinear_{grid}")}
    x, cot, y, gradient = (channels_last(golden[name]) for name in ("in/x", "cot/y", "out/y", "grad/x"))
    ours, vjp = jax.vjp(lambda x: resize(x, *y.shape[1:3], "bilinear"), x)
    assert_near(ours, y, 5e-6, what="output")
    assert_near(vjp(jnp.asarray(cot))[0], gradient, 5e-6, what="gradient")


@pytest.mark.parametrize("grid", GRIDS)
def test_the_low_resolution_sequence_is_the_recorded_one(grid):
    """What enters the official scan is three walks over one map, whose first is by rows and reversed."""
    sequence = arrays("op_msvmamba")[f"ss2d_{grid}/out/scan0_u"].swapaxes(1, 2)
    height, width = (-(-int(n) // 2) for n in grid.split("x"))
    low = sequence[:, : height * width][:, ::-1].reshape(len(sequence), height, width, -1)
    assert_near(Chain(LOW).read(jnp.asarray(low)), sequence, 0, what="sequence")
