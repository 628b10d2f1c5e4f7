"""Training: command, mesh, optimizer, state, setup, step, evaluator, loop, lottery, start."""

from evmamba_jax.config import Config
from evmamba_jax.training.command import parse_command
from evmamba_jax.training.start import run

__all__ = ["Config", "parse_command", "run"]
