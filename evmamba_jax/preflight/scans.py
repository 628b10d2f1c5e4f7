"""Every scan of every registered model. Nothing is computed: models are traced with shapes alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evmamba_jax import list_models
from evmamba_jax.counting.program import equations
from evmamba_jax.models import model_card
from evmamba_jax.models.registry import abstract_model
from evmamba_jax.preflight.kernels import BATCH, Scan

DETECTOR = (800, 1280)  # pixels of one image a chip


def model_scans(*, detector: bool) -> dict[Scan, list[str]]:
    """Return every scan of every registered model in bfloat16, each with the models that have it.

    ``BATCH`` images at once of the input size of a model's card, or, as the backbone of a detector, one image of
    ``DETECTOR`` pixels. Nothing is computed.
    """
    found: dict[Scan, list[str]] = {}
    for name in list_models():
        features, weights = _model(name)
        shape = (1, *DETECTOR, 3) if detector else (BATCH, *model_card(name).input_size, 3)
        images = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for equation in equations(jax.make_jaxpr(features)(weights, images).jaxpr):
            if equation.primitive.name == "scan2d_forward":
                models = found.setdefault(_scan(equation), [])
                models += [name] if name not in models else []
    return found


@functools.cache  # for images of both sizes
def _model(name: str) -> tuple[Callable[[nnx.State, jax.Array], Any], nnx.State]:
    """Return the features of a model as a function of its weights and of images, and the weights as shapes."""
    structure, weights = nnx.split(abstract_model(name, dtype=jnp.bfloat16))

    def features(weights: nnx.State, images: jax.Array) -> Any:
        model = nnx.merge(structure, weights)
        model.eval()
        return model.features(images)

    return features, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)


def _scan(equation: Any) -> Scan:
    x, _, dt_weight, _, A, _ = (value.aval for value in equation.invars)
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"a model in bfloat16 scans {x.dtype}{x.shape}")
    _, options = equation.params["how"]
    return Scan(*x.shape, rank=dt_weight.shape[1], state=A.shape[2], orders=dict(options)["orders"])
