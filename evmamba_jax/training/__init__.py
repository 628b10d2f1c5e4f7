"""Training: configuration, mesh, optimizer, step, loop, reports."""

from evmamba_jax.training.command import parse_command
from evmamba_jax.training.config import Config
from evmamba_jax.training.loop import run

__all__ = ["Config", "parse_command", "run"]
