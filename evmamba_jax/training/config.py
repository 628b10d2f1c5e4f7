"""The names under which ``configs/*.py`` import what ``evmamba_jax.config`` holds."""

from evmamba_jax.config import (
    Config,
    DistributedConfig,
    Duration,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PruningConfig,
    TuneConfig,
)

__all__ = [
    "Config",
    "DistributedConfig",
    "Duration",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PruningConfig",
    "TuneConfig",
]
