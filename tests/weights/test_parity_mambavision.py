"""Our MambaVision against recorded outputs of the official code; tests/golden/README.md has data and limits."""

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
    pyramid_maps,
)

from evmamba_jax.layers.block import Block
from evmamba_jax.layers.mlp import Mlp
from evmamba_jax.layers.projections import conv
from evmamba_jax.models.mambavision import (
    Attention,
    ConvBlock,
    ConvStem,
    MambaVisionMixer,
    WindowStage,
    from_windows,
    to_windows,
)
from evmamba_jax.weights import mambavision as tables
from evmamba_jax.weights.layers import CONV, Row


def test_float32_logits_stages_and_blocks():
    assert_float32("mambavision_t", lambda *given: pyramid_maps(*given, "levels.{}.blocks.{}".format))


def test_float64_logits_and_gradients():
    assert_float64("mambavision_t")


def test_layer_scale_on_an_image_smaller_than_the_windows():
    options = {"width": 16, "stem_width": 8, "depths": (1, 1, 2, 2), "num_heads": (2, 4, 8, 16)}
    assert_float64("mambavision_b", "mambavision_scale", **options, num_classes=10)


class Level(WindowStage):
    """A stage and its downsampling, which the official class holds too."""

    def __call__(self, x):
        return self.downsample(super().__call__(x))


def level(layer_scale):
    """Two mixers and an attention block on windows of 4x4."""

    def build(rngs):
        mixers = [MambaVisionMixer(16, rngs=rngs), MambaVisionMixer(16, rngs=rngs), Attention(16, 4, rngs=rngs)]
        options = {"drop_path": 0.0, "layer_scale": layer_scale, "dtype": None}
        blocks = [Block(16, mixer, Mlp(16, 64, rngs=rngs), **options, rngs=rngs) for mixer in mixers]
        return Level(blocks, conv(16, 32, 3, stride=2, padding=1, use_bias=False, rngs=rngs), 4)

    return build


LEVEL = tables.stage(tables.BLOCK, 3)
PARTS = {
    "attention_12": (lambda rngs: Attention(16, 4, rngs=rngs), tables.ATTENTION, np.asarray),
    "mixer_49": (lambda rngs: MambaVisionMixer(32, rngs=rngs), tables.MIXER, np.asarray),
    "level_7x10_layer_scale": (level(1e-5), LEVEL, channels_last),
    "level_8x8": (level(None), LEVEL, channels_last),
    "conv_block": (lambda rngs: ConvBlock(8, drop_path=0.0, dtype=None, rngs=rngs), tables.CONV_BLOCK, channels_last),
    "patch_embed": (lambda rngs: ConvStem(3, 6, 8, dtype=None, rngs=rngs), tables.STEM, channels_last),
    "downsample": (
        lambda rngs: conv(8, 16, 3, stride=2, padding=1, use_bias=False, rngs=rngs),
        [Row("kernel", "reduction.0.weight", CONV)],
        channels_last,
    ),
}


def test_every_recorded_part_is_compared():
    assert set(PARTS) == {case for case in facts("op_mambavision")["cases"] if not case.startswith("windows_")}


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_all_their_gradients(case):
    build, rows, to_ours = PARTS[case]
    assert_part("op_mambavision", case, build, rows, to_ours=to_ours)


@pytest.mark.parametrize("case", ["windows_7x10", "windows_8x8"])
def test_windows_move_the_same_pixels(case):
    golden = {key.removeprefix(f"{case}/"): array for key, array in arrays("op_mambavision").items()}
    x = jnp.asarray(channels_last(golden["in/x"]))

    def there_and_back(x):
        windows = to_windows(x, 4)
        return windows, from_windows(windows, 4, *x.shape[1:3])

    (windows, back), vjp = jax.vjp(there_and_back, x)
    chex.assert_trees_all_equal(windows, golden["out/windows"])
    chex.assert_trees_all_equal(back, channels_last(golden["out/back"]))
    (gradient,) = vjp((golden["cot/windows"], channels_last(golden["cot/back"])))
    assert_near(gradient, channels_last(golden["grad/x"]), 1e-6)
