"""Our VMamba against recorded outputs of the official code; tests/golden/README.md has data and limits."""

import chex
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
    pyramid_maps,
)

from evmamba_jax.layers.block import Block
from evmamba_jax.layers.mlp import Mlp
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.patches import ConvDownsample, OverlapPatchEmbed, PatchMerging
from evmamba_jax.layers.projections import Linear, conv
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.vmamba import SCANS
from evmamba_jax.weights import vmamba as tables
from evmamba_jax.weights.layers import PATCH_ROWS, ss2d
from pallas_kernels import CROSS


def test_float32_logits_stages_and_blocks():
    assert_float32("vmamba_t", pyramid_maps)


def test_float64_logits_and_gradients():
    assert_float64("vmamba_t")


def test_the_cascade_on_a_rectangle():
    assert_float64("vmamba_t", "vmamba_cascade", width=8, depths=(1, 0, 1, 0), num_classes=10, scan="cascade")


def test_the_first_version_on_a_rectangle():
    assert_float64("vmamba_t_v0", "vmamba_v0", width=8, depths=(1, 1, 1, 1), num_classes=10)


CURRENT = {"d_state": 1, "gate": False, "conv_bias": False}
FIRST = {"d_state": 16, "ssm_ratio": 2.0}


def block(width, mixer, mlp):
    def build(rngs):
        perceptron = Mlp(width, mlp, rngs=rngs) if mlp else None
        return Block(width, SS2D(width, CROSS, **mixer, rngs=rngs), perceptron, drop_path=0.0, dtype=None, rngs=rngs)

    return build


# Our downsamplings always double the channels; the recorded ones map 6 to 10.
def merging_to_ten(rngs):
    part = PatchMerging(6, rngs=rngs)
    part.reduction = Linear(24, 10, use_bias=False, rngs=rngs)
    return part


def downsampling_to_ten(rngs):
    part = ConvDownsample(6, rngs=rngs)
    part.conv = conv(6, 10, 3, stride=2, padding=1, rngs=rngs)
    part.norm = LayerNorm(10, rngs=rngs)
    return part


PARTS = {
    **{
        f"ss2d_v05_noz_ratio{ratio}_nhwc_{grid}": (
            lambda rngs, ratio=ratio: SS2D(12, CROSS, ssm_ratio=ratio, **CURRENT, rngs=rngs),
            ss2d(sets=4),
            np.asarray,
        )
        for ratio in (1, 2)
        for grid in ("5x7", "4x6")
    },
    **{
        f"ss2d_v0_{grid}": (lambda rngs: SS2D(24, CROSS, **FIRST, rngs=rngs), ss2d(sets=4), np.asarray)
        for grid in ("5x7", "4x6")
    },
    "block_v05_noz": (block(12, {"ssm_ratio": 1.0, **CURRENT}, 48), tables.block(4), channels_last),
    "block_v0": (block(24, FIRST, 0), tables.block(4), np.asarray),
    "patch_merging_odd": (merging_to_ten, PATCH_ROWS[PatchMerging], np.asarray),
    "downsample_v3": (downsampling_to_ten, PATCH_ROWS[ConvDownsample], channels_last),
    "patch_embed_v2": (
        lambda rngs: OverlapPatchEmbed(3, 12, rngs=rngs),
        PATCH_ROWS[OverlapPatchEmbed],
        channels_last,
    ),
}


def test_every_recorded_part_is_compared():
    assert set(PARTS) == {case for case in facts("op_vmamba")["cases"] if not case.startswith(("scan_", "merge_"))}


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_all_their_gradients(case):
    build, rows, to_ours = PARTS[case]
    assert_part("op_vmamba", case, build, rows, to_ours=to_ours)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 6)])
@pytest.mark.parametrize(
    ("scan", "official"), [("cross", "cross2d"), ("unidirectional", "unidi"), ("bidirectional", "bidi")]
)
def test_the_orders_of_the_scan_patterns_move_the_same_pixels(scan, official, height, width):
    golden = arrays("op_vmamba")
    read, write = (f"{what}_{official}_{height}x{width}" for what in ("scan", "merge"))
    image = jnp.asarray(channels_last(golden[f"{read}/in/x"]))
    sequences = [np.asarray(order.read(image)).swapaxes(1, 2) for order in SCANS[scan]]
    chex.assert_trees_all_equal(np.stack(sequences, 1), golden[f"{read}/out/y"])

    ys = golden[f"{write}/in/ys"].reshape(2, 4, 3, height * width)  # in scan order, then laid out as (C, H, W)
    written = [order.write(jnp.asarray(ys[:, k].swapaxes(1, 2)), height, width) for k, order in enumerate(SCANS[scan])]
    merged = channels_last(golden[f"{write}/out/y"].reshape(2, 3, height, width))
    assert_near(sum(written), merged, 1e-6)
