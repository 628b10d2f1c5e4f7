"""The recorded outputs of the official code (tests/golden), our models under the same weights, and their comparison.

tests/golden/README.md describes the data and gives the limits.
"""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from official_weights import image, weights

from evmamba_jax.arrays import merge, split
from evmamba_jax.models import abstract_model
from evmamba_jax.models.mambavision import WindowStage, from_windows, to_windows
from evmamba_jax.weights import from_torch
from evmamba_jax.weights.convert import fill_rows, table
from evmamba_jax.weights.layers import Row

FOLDER = Path(__file__).parents[1] / "golden"
MODELS = {
    "evmamba_t": "efficientvmamba_tiny",
    "evmamba_s": "efficientvmamba_small",
    "vmamba_t": "vmamba_tiny_s1l8",
    "msvmamba_n": "msvmamba_nano",
    "vim_t": "vim_tiny",
    "mambavision_t": "mambavision_t",
}
# Vim adds its blocks up without a norm between: its float32 noise is ten times that of the others.
BLOCK_LIMIT = {"vim_t": 2e-3}

# The tests compile unoptimised (tests/conftest.py). Full convolutions, which these models have, then take so long that
# a little optimisation pays.
CONVOLUTIONAL = ("vmamba_t", "mambavision_t")


@cache
def facts(name: str) -> dict:
    """Return the json of a golden file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def abstract(name: str, **options) -> nnx.Module:
    """Return a model whose arrays have shapes only; filling it with given weights needs no others."""
    return abstract_model(name, **options)


def official(name: str, dtype=np.float32, golden: str | None = None, **options) -> tuple[nnx.Module, np.ndarray]:
    """Return one of our models with the weights, and the images, under which the official one was recorded.

    ``golden`` names the file of a small model, with the ``options`` that make ours of its size.
    """
    doc = facts(golden or MODELS[name])
    model = abstract(name, **options)
    from_torch(model, {k: v.astype(dtype) for k, v in weights(doc["state_dict"]).items()})
    return model, image(doc["input"]["shape"], doc["input"]["seed"]).astype(dtype)


def rms(array: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def assert_near(ours, golden: np.ndarray, limit: float, scale: float | None = None, what: str = "") -> None:
    """Assert that the largest difference is below ``limit`` times the rms of the golden (full) array."""
    ours = np.asarray(ours)
    assert ours.shape == golden.shape, what
    allowed = limit * (rms(golden) if scale is None else scale)
    worst = np.abs(ours.astype(np.float64) - golden).max()
    assert worst <= allowed, f"{what}: off by {worst:.2g}, more than the {allowed:.2g} allowed"


# Equal blocks are one program for all of them, as long as they are called one by one.
applied = jax.jit(lambda part, x: part(x))


def pyramid_maps(model, images, official_block: Callable[[int, int], str] = "layers.{}.blocks.{}".format) -> dict:
    """Return what :func:`assert_float32` wants of a model of four stages.

    Blocks have official names by stage and number. MambaVision's of the last two stages were recorded on windows.
    """
    x = applied(model.patch_embed, images)
    maps = {"feat/patch_embed": x}
    for i, stage in enumerate(model.stages):
        size = x.shape[1:3]
        if isinstance(stage, WindowStage):
            x = to_windows(x, stage.window)
        for j, block in enumerate(stage.blocks):
            x = maps[f"block/{official_block(i, j)}"] = applied(block, x)
        if isinstance(stage, WindowStage):
            x = from_windows(x, stage.window, *size)
        maps[f"feat/stage{i + 1}"] = x
        if stage.downsample is not None:
            x = maps[f"feat/stage{i + 1}_down"] = applied(stage.downsample, x)
    maps["feat/norm"] = applied(model.norm, x)
    maps["feat/pooled"] = maps["feat/norm"].mean((1, 2))
    return maps


def assert_float32(name: str, every_map: Callable) -> list[jax.Array]:
    """Assert that logits, features and blocks in float32 are the recorded ones; return the model's ``features``.

    ``every_map(model, images)`` returns the output of every part by the name the golden data gives it. The maps of the
    stages among them, where the family has stages, must be the ``features``. These come of one program with the
    logits, in which equal blocks are a loop; it may add in another order, so they are near and not equal.
    """
    doc, golden = facts(MODELS[name]), arrays(MODELS[name])
    model, images = official(name)
    logits, stages = jax.jit(lambda model, images: (model(images), model.features(images)))(model, images)
    maps = every_map(model, images)
    limit = {key: max(10 * noise, 2e-5) for key, noise in doc["float32_noise"].items()}

    assert_near(logits, golden["logits_f64"], limit["logits"], what="logits")
    assert maps.keys() == doc["arrays"].keys()
    for key, about in doc["arrays"].items():
        ours = np.asarray(maps[key])
        chex.assert_shape(ours, about["full_shape"])
        sample = ours[tuple(slice(*s) for s in about["slices"])]
        assert_near(sample, golden[key], limit.get(key, BLOCK_LIMIT.get(name, 1.5e-4)), about["rms"], key)
        place = key.removeprefix("feat/")
        for mean, axes in (("chan_mean", tuple(range(1, ours.ndim - 1))), ("pos_mean", -1)):
            if f"{mean}/{place}" in golden:  # these cover what the samples leave out
                ours_mean = ours.mean(axes, dtype=np.float64)
                assert_near(ours_mean, golden[f"{mean}/{place}"], limit[key], about["rms"], f"{mean} of {place}")
    if "feat/stage1" in maps:
        for i, stage in enumerate(stages, 1):
            key = f"feat/stage{i}"
            assert_near(stage, np.asarray(maps[key]), limit[key], what=f"stage {i} of features")
    return stages


def assert_float64(name: str, small: str | None = None, **options) -> None:
    """Assert that float64 logits and the gradient of every parameter are the recorded ones, of small models maps too.

    Only float64 shows a wrong epsilon, or a cast down to float32. ``small`` and ``options`` are those of ``official``.
    """
    about, golden = facts(small or MODELS[name])["gradients"], arrays(small or MODELS[name])
    with jax.enable_x64(True):
        model, images = official(name, np.float64, small, **options)
        graphdef, params, batch_stats = split(model)
        labels = jnp.asarray(about["labels"])

        def loss(params):
            model = merge(graphdef, params, batch_stats)
            logits, maps = model(images), model.features(images) if small else ()
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean(), (logits, maps)

        effort = {"xla_backend_optimization_level": 1} if name in CONVOLUTIONAL and not small else None
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=effort)
        (value, (logits, maps)), gradients = run(params)
    assert logits.dtype == np.float64
    assert_near(logits, golden["logits_f64"], 1e-8, what="logits")
    assert len(maps) == sum(key.startswith("feat_f64/") for key in golden)
    for i, ours in enumerate(maps, 1):
        assert_near(ours[:1], golden[f"feat_f64/stage{i}"], 1e-8, what=f"stage {i}")
    assert abs(float(value) - golden["grad/loss_f64"]) < 1e-8

    rows = {row.official: row for row in table(model) if row.ours in params}
    assert set(about["names"]) == set(rows)
    for official_name, l2, first8 in zip(about["names"], golden["grad/l2_f64"], golden["grad/first8_f64"], strict=True):
        row = rows[official_name]
        ours = row.layout.to_official(np.asarray(gradients[row.ours]))
        assert abs(np.linalg.norm(ours) - l2) <= 1e-6 * l2, official_name
        size = min(8, ours.size)
        assert_near(ours.ravel()[:size], first8[:size], 1e-6, l2 / np.sqrt(ours.size), official_name)


def channels_last(array: np.ndarray) -> np.ndarray:
    """Return (B, C, H, W) as (B, H, W, C)."""
    return np.moveaxis(array, 1, -1)


def assert_part(
    doc: str,
    case: str,
    build: Callable[[nnx.Rngs], nnx.Module],
    rows: Iterable[Row],
    *,
    to_ours: Callable[[np.ndarray], np.ndarray] = lambda array: array,
) -> None:
    """Assert that one layer with its recorded weights has the recorded output and gradients, in float32.

    Args:
        doc: name of the golden file, e.g. ``op_vmamba``.
        case: name of the case in it; input ``x``, output ``y``.
        build: makes our layer.
        rows: official names of its parameters, without the prefix of the case.
        to_ours: brings recorded inputs and outputs into our layout, e.g. ``channels_last``.
    """
    about, golden = facts(doc)["cases"][case], arrays(doc)
    part = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    rows = list(rows)
    fill_rows(part, rows, {k.removeprefix(about["prefix"]): v for k, v in weights(about["state_dict"]).items()})
    part.eval()
    graphdef, params, batch_stats = split(part)

    def run(params, x, cot):
        y, vjp = jax.vjp(lambda params, x: merge(graphdef, params, batch_stats)(x), params, x)
        return y, *vjp(cot)

    y, d_params, d_x = jax.jit(run)(params, *(to_ours(golden[f"{case}/{name}"]) for name in ("in/x", "cot/y")))
    assert_near(y, to_ours(golden[f"{case}/out/y"]), 5e-5, what="output")
    assert_near(d_x, to_ours(golden[f"{case}/grad/x"]), 5e-4, what="input")
    trained = [row for row in rows if row.ours in params]
    assert len(trained) == sum(key.startswith(f"{case}/grad_param/") for key in golden) == len(params)
    for row in trained:
        expected = golden[f"{case}/grad_param/{about['prefix']}{row.official}"]
        assert_near(row.layout.to_official(np.asarray(d_params[row.ours])), expected, 5e-4, what=row.official)
