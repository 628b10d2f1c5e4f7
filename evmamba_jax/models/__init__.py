"""The model families, one file each, and their registry."""

# In the order of the README's table, which has no models for experiments.
from evmamba_jax.models import efficientvmamba, vmamba, msvmamba, vim, mambavision, course_vim  # noqa: F401, I001
from evmamba_jax.models.registry import abstract_model, build_model, configuration, list_models, model_card

__all__ = ["abstract_model", "build_model", "configuration", "list_models", "model_card"]
