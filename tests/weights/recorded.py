"""The recorded outputs of the official code (tests/golden), and our models under the same weights."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from flax import nnx
from official_weights import image, weights

from evmamba_jax import create_model
from evmamba_jax.weights import from_torch

FOLDER = Path(__file__).parents[1] / "golden"
MODELS = {"evmamba_t": "efficientvmamba_tiny", "evmamba_s": "efficientvmamba_small"}


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
    return nnx.eval_shape(lambda: create_model(name, **options))


def official(name: str, dtype=np.float32) -> tuple[nnx.Module, np.ndarray]:
    """Return one of our models with the weights, and the images, under which the official one was recorded."""
    doc = facts(MODELS[name])
    model = abstract(name)
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
