"""Sparse models: masks beside the parameters, drawn rarely, kept by one multiplication; channels that are cut out."""

from evmamba_jax.pruning.early_bird import EarlyBird
from evmamba_jax.pruning.groups import (
    channel_masks,
    channel_scores,
    channels,
    cut,
    kept_channels,
    select_channels,
    zero_channels,
)
from evmamba_jax.pruning.masks import (
    Masks,
    apply,
    distance,
    mask_moments,
    prunable,
    select,
    sparsity,
    table,
    transformation,
    zeros_wanted,
)
from evmamba_jax.pruning.schedules import cosine, cubic
from evmamba_jax.pruning.scores import SCORES, Score
from evmamba_jax.pruning.tickets import further, loss_barrier

__all__ = [
    "SCORES",
    "EarlyBird",
    "Masks",
    "Score",
    "apply",
    "channel_masks",
    "channel_scores",
    "channels",
    "cosine",
    "cubic",
    "cut",
    "distance",
    "further",
    "kept_channels",
    "loss_barrier",
    "mask_moments",
    "prunable",
    "select",
    "select_channels",
    "sparsity",
    "table",
    "transformation",
    "zero_channels",
    "zeros_wanted",
]
