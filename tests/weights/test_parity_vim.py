"""Our Vim against recorded outputs of the official code; tests/golden/README.md has data and limits."""

import jax
import numpy as np
import pytest
from flax import nnx
from official_outputs import applied, arrays, assert_float32, assert_float64, assert_near, assert_part, facts
from official_weights import weights

from evmamba_jax.arrays import merge, split
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.initializers import ScanInit
from evmamba_jax.layers.norm import RMSNorm
from evmamba_jax.layers.projections import depthwise_conv
from evmamba_jax.models.vim import Direction, VimMixer
from evmamba_jax.weights import vim as tables
from evmamba_jax.weights.layers import SAME, Layout, Row, kernel


def every_map(model, images):
    """Return the output of every part; of a block the official code has what it adds and what it adds it to."""
    patches = applied(model.patch_embed, images)
    x = jax.jit(lambda model, images: model.tokens(images))(model, images)
    maps = {"feat/patch_embed": patches.reshape(len(images), -1, patches.shape[-1]), "feat/tokens": x}
    added = jax.jit(lambda block, x: block.mixer(block.norm(x)))
    for i, block in enumerate(model.blocks):
        hidden = maps[f"block/layers.{i}.hidden"] = added(block, x)
        if i in (0, 1, 5, 11, 17, 23):
            maps[f"feat/layer{i}_hidden"], maps[f"feat/layer{i}_residual"] = hidden, x
        x = x + hidden
    maps["feat/pooled"] = applied(model.norm, x)[:, 98]
    return maps


def test_float32_logits_tokens_blocks_and_the_residual_stream_after_each_quarter():
    stages = assert_float32("vim_t", every_map)
    about, golden = facts("vim_tiny")["arrays"], arrays("vim_tiny")
    for i, stage in zip((5, 11, 17, 23), stages, strict=True):
        # The official backbone adds the pair that a block returns (last_layer_process "add").
        expected = golden[f"feat/layer{i}_hidden"] + golden[f"feat/layer{i}_residual"]
        assert stage.shape == (2, 14, 14, 192)
        ours = np.insert(np.asarray(stage).reshape(2, 196, 192), 98, np.nan, axis=1)  # no sample is of this token
        sample = ours[tuple(slice(*s) for s in about[f"feat/layer{i}_hidden"]["slices"])]
        assert_near(sample, expected, 1e-3, what=f"after block {i}")


def test_float64_logits_and_gradients():
    assert_float64("vim_t")


def test_another_image_size():
    options = {"width": 16, "depth": 4, "image_size": (75, 50), "num_classes": 10}
    assert_float64("vim_t", "vim_rectangle", **options, remat="block")


@pytest.mark.parametrize("case", ["mixer_11", "mixer_18"])
def test_mixer_and_all_its_gradients(case):
    assert_part("op_vim", case, lambda rngs: VimMixer(16, rngs=rngs), tables.MIXER)


def part(build, rows, given):
    """Return our module with official arrays, which may be traced: gradients then come in the official layout."""
    graphdef, params, batch_stats = split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return merge(
        graphdef, {row.ours: row.layout.to_ours(given[row.official]) for row in rows if row.ours in params}, batch_stats
    )


def channels_second(f):
    """Make a function of (B, L, C) one of (B, C, L)."""
    return lambda x: f(x.swapaxes(1, 2)).swapaxes(1, 2)


def causal_conv_silu(given):
    def build(rngs):
        return depthwise_conv(5, (4,), padding=[(3, 0)], rngs=rngs)

    conv = part(build, [Row("kernel", "weight", Layout("c k", "k 1 c")), Row("bias", "bias", SAME)], given)
    return {"y": channels_second(lambda x: nnx.silu(conv(x)))(given["x"])}


def inner(given):
    def build(rngs):
        options = {
            "reverse": False,
            "d_state": 16,
            "d_conv": 4,
            "scan_init": ScanInit(),
            "dtype": None,
            "implementation": None,
        }
        return Direction(32, 8, **options, rngs=rngs)  # width 32: a time step of rank 2

    rows = [
        *kernel("conv", "conv", tables.CONV1D),
        Row("scan.x_proj", "x_proj", Layout("c e", "1 e c")),
        Row("scan.dt_proj", "dt_proj", Layout("e r", "1 r e")),
        Row("scan.dt_bias", "delta_bias", Layout("e", "1 e")),
        Row("scan.A_log", "A_log", Layout("e n", "1 e n")),
        Row("scan.D", "D", Layout("e", "1 e")),
    ]
    names = {"conv.weight": given["conv_weight"], "conv.bias": given["conv_bias"], "A_log": jax.numpy.log(-given["A"])}
    direction = part(build, rows, given | names)
    x, z = jax.numpy.split(given["xz"], 2, axis=1)
    return {"y": channels_second(direction)(x) * nnx.silu(z)}


def rms_add(given):
    norm = part(lambda rngs: RMSNorm(16, rngs=rngs), [Row("scale", "weight", SAME)], given)
    residual = given["residual"] + given["x"]
    return {"y": norm(residual), "residual": residual}


def two_blocks(given):
    def build(rngs):
        options = {"drop_path": 0.0, "norm": RMSNorm, "dtype": None, "rngs": rngs}
        return nnx.List([Block(16, VimMixer(16, rngs=rngs), None, **options) for _ in range(2)])

    first, second = part(build, tables.blocks("", 2), given)
    residual = first(given["x"])
    return {"hidden": second(residual) - residual, "residual": residual}


PARTS = {
    **{f"causal_conv_silu_{length}": causal_conv_silu for length in (11, 18)},
    **{f"inner_{length}": inner for length in (11, 18)},
    **{f"rms_add_{length}": rms_add for length in (11, 18)},
    "two_blocks": two_blocks,
}


def test_every_recorded_part_is_compared():
    assert {*PARTS, "mixer_11", "mixer_18"} == set(facts("op_vim")["cases"])


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_all_their_gradients(case):
    golden = {key.removeprefix(f"{case}/"): a for key, a in arrays("op_vim").items() if key.startswith(f"{case}/")}

    def named(kind):
        return {key.split("/", 1)[1]: a for key, a in golden.items() if key.startswith(f"{kind}/")}

    inputs = named("in") | weights(facts("op_vim")["cases"][case].get("state_dict", {}))

    @jax.jit
    def run(inputs, cot):
        outputs, vjp = jax.vjp(PARTS[case], inputs)
        return outputs, vjp(cot)[0]

    outputs, gradients = run(inputs, named("cot"))
    assert outputs.keys() == named("out").keys()
    for name, expected in named("out").items():
        assert_near(outputs[name], expected, 5e-5, what=name)
    wanted = named("grad") | named("grad_param")
    assert gradients.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert_near(gradients[name], expected, 5e-4, what=name)
