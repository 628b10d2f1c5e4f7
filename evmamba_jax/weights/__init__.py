"""Official PyTorch weights: reading the files, and putting them into our models."""

from evmamba_jax.weights.convert import from_torch, to_torch
from evmamba_jax.weights.load import Weights, average_is_better, load_weights, open_model
from evmamba_jax.weights.torch_file import load_torch_file

__all__ = ["Weights", "average_is_better", "from_torch", "load_torch_file", "load_weights", "open_model", "to_torch"]
