"""The model families, one file each, and their registry."""

# isort: off - the order of the README's table
from evmamba_jax.models import efficientvmamba as efficientvmamba
from evmamba_jax.models import mambavision as mambavision
from evmamba_jax.models import msvmamba as msvmamba
from evmamba_jax.models import vim as vim
from evmamba_jax.models import vmamba as vmamba

# isort: on
from evmamba_jax.models.registry import abstract_model, build_model, list_models, model_card

__all__ = ["abstract_model", "build_model", "list_models", "model_card"]
