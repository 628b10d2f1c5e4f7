"""Vision state-space models in JAX and Flax."""

from evmamba_jax.factory import create_model
from evmamba_jax.models import list_models, model_card

__version__ = "0.1.0"

__all__ = ["create_model", "list_models", "model_card"]
