"""Our EfficientVMamba against recorded outputs of the official code; tests/golden/README.md has data and limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import digest, image, weights
from recorded import MODELS, arrays, assert_near, facts, official, rms

from evmamba_jax import functional
from evmamba_jax.layers.patches import PatchMerging
from evmamba_jax.layers.projections import Linear
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.efficientvmamba import ChannelGate, EVSSBlock, InvertedResidual
from evmamba_jax.weights import efficientvmamba as tables
from evmamba_jax.weights import layers
from evmamba_jax.weights.convert import fill
from pallas_kernels import ATROUS, selective_scan

TINY = MODELS["evmamba_t"]


@pytest.mark.parametrize("name", MODELS.values())
def test_the_rule_gives_the_recorded_weights_and_images(name):
    doc = facts(name)
    assert digest(weights(doc["state_dict"])) == doc["weights_sha256"]
    x = image(doc["input"]["shape"], doc["input"]["seed"])
    assert digest({"x": x.transpose(0, 3, 1, 2)}) == doc["input"]["sha256"]


def every_map(model, images):
    """Return the output of every part by the name the golden data gives it, and of the two public methods."""
    maps = {"feat/patch_embed": model.patch_embed(images)}
    x = maps["feat/patch_embed"]
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            x = block(x)
            maps[f"block/layers.{i}.blocks.{j}" if i < 2 else f"block/layers.{i}.{j + 1}"] = x
        maps[f"feat/stage{i + 1}"] = x
        if stage.downsample is not None:
            x = maps[f"feat/stage{i + 1}_down"] = stage.downsample(x)
    maps["feat/norm"] = model.norm(x)
    maps["feat/pooled"] = maps["feat/norm"].mean((1, 2))
    return maps, model.features(images), model(images)


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_stages_and_blocks(name):
    doc, golden = facts(MODELS[name]), arrays(MODELS[name])
    model, images = official(name)
    maps, stages, logits = jax.jit(every_map)(model, images)
    limit = {key: max(10 * noise, 2e-5) for key, noise in doc["float32_noise"].items()}

    assert_near(logits, golden["logits_f64"], limit["logits"], what="logits")
    assert maps.keys() == doc["arrays"].keys()
    for key, about in doc["arrays"].items():
        ours = np.asarray(maps[key])
        chex.assert_shape(ours, about["full_shape"])
        sample = ours[tuple(slice(*s) for s in about["slices"])]
        assert_near(sample, golden[key], limit.get(key, 1.5e-4), about["rms"], key)
        place = key.removeprefix("feat/")
        for mean, axes in (("chan_mean", (1, 2)), ("pos_mean", (3,))):  # these cover what the samples leave out
            if f"{mean}/{place}" in golden:
                ours_mean = ours.mean(axes, dtype=np.float64)
                assert_near(ours_mean, golden[f"{mean}/{place}"], limit[key], about["rms"], f"{mean} of {place}")
    assert len(stages) == 4
    chex.assert_trees_all_equal(list(stages), [maps[f"feat/stage{i}"] for i in (1, 2, 3, 4)])


@pytest.mark.parametrize("name", MODELS)
def test_float64_logits(name):
    """Only float64 shows a wrong epsilon or a cast down to float32."""
    with jax.enable_x64(True):
        model, images = official(name, np.float64)
        logits = jax.jit(lambda model, images: model(images))(model, images)
        assert logits.dtype == np.float64
        assert_near(logits, arrays(MODELS[name])["logits_f64"], 1e-8, what="logits")


def test_float64_gradients_of_every_parameter():
    about, golden = facts(TINY)["gradients"], arrays(TINY)
    with jax.enable_x64(True):
        model, images = official("evmamba_t", np.float64)
        graphdef, params, batch_stats = functional.split(model)
        labels = jnp.asarray(about["labels"])

        def loss(params):
            logits = functional.merge(graphdef, params, batch_stats)(images)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - golden["grad/loss_f64"]) < 1e-8

    rows = {row.official: row for row in tables.table(model)}
    assert set(about["names"]) == {name for name, row in rows.items() if row.ours in params}
    for name, l2, first8 in zip(about["names"], golden["grad/l2_f64"], golden["grad/first8_f64"], strict=True):
        ours = rows[name].layout.to_official(np.asarray(gradients[rows[name].ours]))
        assert abs(np.linalg.norm(ours) - l2) <= 1e-6 * l2, name
        size = min(8, ours.size)
        assert_near(ours.ravel()[:size], first8[:size], 1e-6, l2 / np.sqrt(ours.size), name)


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
        f"ss2d_{height}x{width}": (lambda rngs: SS2D(WIDTH, ATROUS, rngs=rngs), layers.ss2d(4))
        for height, width in GRIDS
    },
    "bi_attn": (lambda rngs: ChannelGate(WIDTH, dtype=None, rngs=rngs), tables.CHANNEL_GATE),
    "block": (lambda rngs: EVSSBlock(WIDTH, **EVSS_OPTIONS, rngs=rngs), tables.EVSS_BLOCK),
    "inverted_residual": (
        lambda rngs: InvertedResidual(8, drop_path=0.0, dtype=None, rngs=rngs),
        tables.INVERTED_RESIDUAL,
    ),
    "patch_merging_odd": (merging_to_ten, layers.patch_merging()),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_all_their_gradients(case):
    build, rows = PARTS[case]
    about, golden = facts("op_efficientvmamba")["cases"][case], arrays("op_efficientvmamba")
    part = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    fill(part, rows, {k.removeprefix(about["prefix"]): v for k, v in weights(about["state_dict"]).items()})
    graphdef, params, batch_stats = functional.split(part)
    channels_last = (0, 2, 3, 1) if case == "inverted_residual" else (0, 1, 2, 3)
    x, cot = (golden[f"{case}/{name}"].transpose(channels_last) for name in ("in/x", "cot/y"))

    @jax.jit
    def run(params, x):
        y, vjp = jax.vjp(lambda params, x: functional.merge(graphdef, params, batch_stats)(x), params, x)
        return y, *vjp(jnp.asarray(cot))

    y, d_params, d_x = run(params, x)
    assert_near(y, golden[f"{case}/out/y"].transpose(channels_last), 5e-5, what="output")
    assert_near(d_x, golden[f"{case}/grad/x"].transpose(channels_last), 5e-4, what="input")
    trained = [row for row in rows if row.ours in params]
    assert len(trained) == sum(key.startswith(f"{case}/grad_param/") for key in golden) == len(params)
    for row in trained:
        expected = golden[f"{case}/grad_param/{about['prefix']}{row.official}"]
        assert_near(row.layout.to_official(np.asarray(d_params[row.ours])), expected, 5e-4, what=row.official)


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


def test_a_gradient_that_is_wrong_would_be_seen():
    golden = np.linspace(1, 2, 5)
    with pytest.raises(AssertionError, match="more than"):
        assert_near(golden + 1e-3 * rms(golden), golden, 5e-4)
