"""The model families, one file each, and their registry."""

# In the order of the README's table.
# isort: off
from evmamba_jax.models import efficientvmamba as efficientvmamba
from evmamba_jax.models import vmamba as vmamba
from evmamba_jax.models import msvmamba as msvmamba
from evmamba_jax.models import vim as vim
from evmamba_jax.models import mambavision as mambavision

# isort: on
from evmamba_jax.models.registry import abstract_model, build_model, configuration, list_models, model_card

__all__ = ["abstract_model", "build_model", "configuration", "list_models", "model_card"]
