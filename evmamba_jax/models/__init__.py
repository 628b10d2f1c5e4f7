"""The model families, one file each, and their registry."""

from evmamba_jax.models import efficientvmamba as efficientvmamba
from evmamba_jax.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
