"""Vision state-space models in JAX and Flax."""

from typing import Any

from evmamba_jax.factory import create_model
from evmamba_jax.models import list_models, model_card
from evmamba_jax.models.registry import ModelCard

__version__ = "0.1.0"

__all__ = ["create_model", "list_models", "model_card", "preprocess"]


def preprocess(pictures: Any, model: str | ModelCard, *, image_size: int | None = None) -> Any:
    """Return a model's input of pictures: see :func:`evmamba_jax.preprocessing.preprocess`."""
    # The libraries that read pictures take a moment to import; only who has pictures waits for it.
    from evmamba_jax.preprocessing import preprocess

    return preprocess(pictures, model, image_size=image_size)
