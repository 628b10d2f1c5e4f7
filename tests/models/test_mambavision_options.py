"""The variations of MambaVision, each on a tiny model: what every option must do, and what each one is."""

import dataclasses
import functools
import math
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax import create_model
from evmamba_jax.analysis import count_parameters
from evmamba_jax.arrays import Arrays, merge, split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.counting.program import equations
from evmamba_jax.errors import UserError
from evmamba_jax.layers import blocks
from evmamba_jax.layers.s6 import S6
from evmamba_jax.models import abstract_model
from evmamba_jax.models.mambavision import ConvNeXtBlock, MambaVisionConfig, MambaVisionMixer, WindowStage
from evmamba_jax.training.optimizer import decay_mask
from evmamba_jax.weights import from_torch, to_torch
from evmamba_jax.weights.load import open_place

TINY = {
    "width": 8,
    "stem_width": 4,
    "depths": (0, 1, 0, 0),
    "num_heads": (1, 1, 2, 4),
    "window_size": (8, 8, 2, 2),
    "num_classes": 5,
    "d_state": 4,
}
# Equal blocks, of which three are a loop where their activations are not kept: convolutions, mixers, attention.
CONVOLUTIONS, MIXERS, ATTENTION = ({"depths": depths} for depths in ((3, 0, 0, 0), (0, 0, 5, 0), (0, 0, 6, 0)))
SWITCHES = {
    "attention_radius": {"attention_radius": 1, **ATTENTION},
    "attention_edges": {"attention_radius": 1, "attention_edges": "shift", **ATTENTION},
    "s4d": {"ssm": "s4d", **MIXERS},
    "s5": {"ssm": "s5", **MIXERS},
    "s6_bidirectional": {"ssm_bidirectional": True, **MIXERS},
    "s4d_bidirectional": {"ssm": "s4d", "ssm_bidirectional": True, **MIXERS},
    "s5_bidirectional": {"ssm": "s5", "ssm_bidirectional": True, **MIXERS},
    "downsample_attention": {"downsample": "attention"},
    "downsample_convnext": {"downsample": "convnext"},
    "pool": {"pool": "attention"},
    "conv_block": {"conv_block": "convnext", **CONVOLUTIONS},
    "stem": {"stem": "patchify"},
    "stem_norm": {"stem_norm": "layer"},
}
every_switch = pytest.mark.parametrize("switch", SWITCHES)
SIZE, ODD = (48, 64), (33, 61)  # every map of the second is odd, or padded to whole windows


@functools.cache
def model(switch, **more):
    return create_model("mambavision_t", **{**TINY, **SWITCHES.get(switch, {}), **more}, rngs=nnx.Rngs(2))


def images(size, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, *size, 3))


def structure(switch, **more):
    return split(model(switch, **more)).graphdef


class Results(NamedTuple):
    logits: jax.Array
    gradients: Arrays


def traced(switch, **more):
    """Return the program of a model forward and backward, as evaluation runs it, and its arguments."""
    given, (_, params, stats) = structure(switch, **more), split(model(switch))

    def run(params, x):
        def loss(params):
            logits = merge(given, params, stats)(x)
            return (logits * jnp.arange(1.0, 6)).sum(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return Results(logits, gradients)

    arguments = params, images(SIZE)
    return jax.jit(run).trace(*arguments), arguments


def loops(program):
    """Return how many loops over three blocks there are."""
    found = equations(program.jaxpr.jaxpr)
    return sum(e.primitive.name == "scan" and e.params["length"] == 3 for e in found)


def close(ours, wanted):
    scale = jax.tree.map(lambda a: np.abs(a).max() + 1e-6, wanted)
    jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a, b, atol=1e-4 * s, rtol=0), ours, wanted, scale)


@every_switch
def test_what_every_option_must_do(switch, monkeypatch, tmp_path):
    # Features of every level, of any size.
    for size in (SIZE, ODD):
        maps = jax.eval_shape(lambda model, x: model.features(x), model(switch), images(size))
        h, w = (n // 4 if switch == "stem" else -(-n // 4) for n in size)
        for i, stage in enumerate(maps):
            chex.assert_shape(stage, (2, h, w, 8 * 2**i))
            h, w = -(-h // 2), -(-w // 2)

    program, arguments = traced(switch)
    found = program.lower().compile()(*arguments)
    chex.assert_tree_all_finite(found)
    assert jnp.abs(found.logits[0] - found.logits[1]).max() > 1e-5

    # Gradients reach every parameter; that a softmax does not see a bias of all its keys is no fault.
    zero = [path for path, gradient in found.gradients.items() if not gradient.any()]
    assert [path for path in zero if path != "pool.key.bias"] == []

    # Rematerialised it is the same, and block by block.
    rematerialised, _ = traced(switch, remat="block")
    close(rematerialised.lower().compile()(*arguments), found)
    looped = SWITCHES[switch].get("depths") is not None
    assert (bool(loops(program)), bool(loops(rematerialised))) == (looped, looped)
    if looped:
        monkeypatch.setattr(blocks, "FEWEST", sys.maxsize)
        unrolled = jax.jit(lambda model, x: model(x)).trace(model(switch), arguments[1])
        monkeypatch.undo()
        assert not loops(unrolled)
        close(unrolled.lower().compile()(model(switch), arguments[1]), found.logits)

    # In bfloat16 it is nearly the same; at another size.
    low, (exact, params, stats) = structure(switch, dtype=jnp.bfloat16), split(model(switch))
    both = jax.jit(lambda params, x: [merge(given, params, stats)(x) for given in (exact, low)])
    wide, narrow = both(params, images(ODD))
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    wide, narrow = (np.asarray(y, np.float64) for y in (wide, narrow))
    assert 1e-5 < np.linalg.norm(narrow - wide) / np.linalg.norm(wide) < 0.05

    # Saved and loaded it is the same to the bit.
    options = {**TINY, **SWITCHES[switch]}
    save_model(tmp_path, params=params, batch_stats=stats, meta={"model": "mambavision_t", "options": options})
    opened = open_place(tmp_path)
    assert opened.model.config == model(switch).config
    chex.assert_trees_all_equal(split(opened.model)[1:], (params, stats))


def test_over_devices_nothing_but_sums_is_sent():
    """S4D has a test of its own; the others leave it to XLA."""
    options = {"attention_radius": 1, "downsample": "attention", "pool": "attention", "ssm": "s5"}
    given, params, stats = split(model("none", depths=(0, 0, 2, 0), **options, ssm_bidirectional=True))
    x = images((48, 160), batch=8)  # of two tiles

    @jax.jit
    @jax.value_and_grad
    def gradient(params, x):
        return (merge(given, params, stats)(x) * jnp.arange(1.0, 6)).sum()

    wanted = gradient(params, x)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        compiled = gradient.lower(placed, x).compile()
        close(compiled(placed, x), wanted)
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]


# Official weights


PUBLISHED = {field.name: field.default for field in dataclasses.fields(MambaVisionConfig)}


@every_switch
def test_official_weights_are_for_models_without_the_option(switch):
    options = {**TINY, **SWITCHES[switch]}
    varied = {name: value for name, value in SWITCHES[switch].items() if name != "depths"}
    published = model("none", **options | {name: PUBLISHED[name] for name in varied})
    if "attention_radius" in varied:
        ours = create_model("mambavision_t", **options)
        from_torch(ours, to_torch(published))
        chex.assert_trees_all_equal(split(ours)[1:], split(published)[1:])
        return
    option, value = next(iter(varied.items()))
    for call in (lambda: from_torch(model(switch), to_torch(published)), lambda: to_torch(model(switch))):
        with pytest.raises(UserError) as caught:
            call()
        assert f"MambaVision with {option}={value!r} has no official names" in str(caught.value)
        assert "\n" not in str(caught.value)


# What each is


def test_sliding_windows_see_the_whole_map_and_mixers_their_windows():
    stage = model("attention_radius", depths=(0, 0, 2, 0)).stages[2]
    assert isinstance(stage, WindowStage)
    x = np.random.default_rng(0).normal(size=(1, 7, 7, 32))
    changed = x.copy()
    changed[0, 3, 2, :5] += 1
    with jax.enable_x64(True):  # what reaches far is little
        run = jax.jit(lambda stage, x: stage(x))
        reached = np.abs(np.asarray(run(stage, x) - run(stage, changed))).max((0, 3)) > 0
    # The third of four tokens of its window: the mixer's convolution reaches the one before and the one after, its scan
    # those after. From there attention reaches one pixel further, over the borders of windows.
    wanted = np.zeros((7, 7), bool)
    for i, j in ((2, 3), (3, 2), (3, 3)):
        wanted[i - 1 : i + 2, j - 1 : j + 2] = True
    chex.assert_trees_all_equal(reached, wanted)


def test_a_radius_over_the_map_is_attention_in_one_window():
    options = {"window_size": (8, 8, 4, 4), "depths": (0, 0, 2, 0)}
    near, params, stats = split(model("none", **options))
    far = structure("none", **options, attention_radius=4)
    x = images((64, 64))
    run = jax.jit(lambda params, x: [merge(given, params, stats)(x) for given in (near, far)])
    one, other = run(params, x)
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ssm", ["s6", "s4d", "s5"])
def test_both_directions_see_all_tokens(ssm):
    """A causal mixer's last token sees all, its first only what the convolution does."""

    def sees(bidirectional):
        mixer = MambaVisionMixer(8, ssm=ssm, bidirectional=bidirectional, d_state=4, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(1, 9, 8))
        with jax.enable_x64(True):
            of = jax.jit(jax.jacrev(lambda x: mixer(x)[0].sum(-1)))(jnp.asarray(x))[:, 0]
        of = np.abs(np.asarray(of)).max(-1)
        return of > 1e-14 * of.max()  # transforms leave a rest of rounding everywhere

    causal = sees(False)
    assert not causal[0, 2:].any()
    assert causal[-1].all()
    assert sees(True).all()


def test_scans_in_both_directions_have_parameters_of_their_own():
    mixer = MambaVisionMixer(8, bidirectional=True, d_state=4, rngs=nnx.Rngs(0))
    assert isinstance(mixer.scan, S6)
    assert mixer.scan.A_log.shape == (2, 4, 4)


def test_convnext_block_by_hand():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        structure, params, _ = split(ConvNeXtBlock(3, drop_path=0.0, dtype=None, rngs=nnx.Rngs(0)))
        assert (params["gamma"] == np.float32(1e-6)).all()
        params = {path: rng.normal(size=array.shape) for path, array in params.items()}
        x = rng.normal(size=(1, 5, 9, 3))
        y = jax.jit(lambda params, x: merge(structure, params, {})(x))(params, x)
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    z = sum(padded[:, i : i + 5, j : j + 9] * params["conv.kernel"][i, j, 0] for i, j in np.ndindex(7, 7))
    z = z + params["conv.bias"]
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    z = (z * params["norm.scale"] + params["norm.bias"]) @ params["mlp.fc1.kernel"] + params["mlp.fc1.bias"]
    erf = np.vectorize(math.erf)
    z = z * (1 + erf(z / np.sqrt(2))) / 2 @ params["mlp.fc2.kernel"] + params["mlp.fc2.bias"]
    chex.assert_trees_all_close(np.asarray(y), x + params["gamma"] * z, rtol=1e-10, atol=1e-10)


def test_parameters_of_each_switch():
    """By hand, at full size: what each adds to or takes from T."""
    published = count_parameters("mambavision_t")

    def more(**options):
        return count_parameters(abstract_model("mambavision_t", **options)) - published

    mixers = [(320, 4), (640, 2)]  # width and number; E is half of the width
    s6 = {c: (c // 2) * (c // 16 + 16) + c // 16 * (c // 2) + c // 2 + 8 * c // 2 + c // 2 for c, _ in mixers}
    s4d = {c: c // 2 * (1 + 4 + 4 + 8) + c // 2 for c, _ in mixers}
    s5 = {c: 4 + 4 + 2 * 4 * c // 2 + 2 * 4 * c // 2 + c // 2 + 4 for c, _ in mixers}
    assert more(attention_radius=3, attention_edges="shift") == 0
    assert more(ssm="s4d") == sum(n * (s4d[c] - s6[c]) for c, n in mixers)
    assert more(ssm="s5") == sum(n * (s5[c] - s6[c]) for c, n in mixers)
    assert more(ssm_bidirectional=True) == sum(n * s6[c] for c, n in mixers)
    halvings = (80, 160, 320)
    assert more(downsample="attention") == sum(c + 2 * c * c - 18 * c * c for c in halvings)
    assert more(downsample="convnext") == sum(2 * c + 8 * c * c + 2 * c - 18 * c * c for c in halvings)
    assert more(pool="attention") == 640 + 3 * (640 * 640 + 640)
    conv = {c: 2 * (9 * c * c + c + 2 * c) for c in (80, 160)}
    convnext = {c: 49 * c + c + 2 * c + 8 * c * c + 5 * c + c for c in (80, 160)}
    assert more(conv_block="convnext") == sum(n * (convnext[c] - conv[c]) for c, n in ((80, 1), (160, 3)))
    assert more(stem="patchify") == 48 * 80 + 80 + 160 - (27 * 32 + 64 + 9 * 32 * 80 + 160)
    assert more(stem_norm="layer") == 0


def test_weight_decay_spares_what_systems_and_queries_are_made_of():
    options = {"ssm_bidirectional": True, "downsample": "attention", "pool": "attention", "conv_block": "convnext"}
    spared = set()
    for ssm in ("s4d", "s5"):
        made = abstract_model("mambavision_t", **{**TINY, "depths": (1, 0, 1, 1)}, ssm=ssm, **options)
        spared |= {path.split(".")[-1] for path, decayed in decay_mask(split(made).params).items() if not decayed}
    kernel = {"log_dt", "log_A_real", "A_imag"}
    assert spared == {
        *kernel,
        *(f"backward_{name}" for name in kernel),
        *("Lambda_re", "Lambda_im", "log_step", "D"),
        *("score", "query", "gamma", "scale", "bias"),
    }


def test_patches_need_four_pixels():
    with pytest.raises(UserError, match="image size 3x8 is too small: height and width must be at least 4"):
        model("stem")(jnp.zeros((1, 3, 8, 3)))
    for switch in ("attention_edges", "s4d", "s5", "downsample_attention", "downsample_convnext", "pool"):
        jax.eval_shape(lambda model, x: model(x), model(switch), jnp.zeros((1, 1, 1, 3)))
