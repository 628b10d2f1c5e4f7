"""Early-bird tickets: masks drawn, not applied, until they no longer move."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from evmamba_jax.pruning.masks import distance


@dataclasses.dataclass(frozen=True)
class EarlyBird:
    """A ticket is found when the last distances from mask to mask are all small.

    The paper's rule. The authors' ``main.py`` has another: the newest of five masks beside the four before it.

    Attributes:
        limit: what the largest of the distances has to be below.
        length: how many distances are looked at.

    Source: You et al., Drawing early-bird tickets (arXiv:1909.11957), algorithm 1.
    """

    limit: float = 0.1
    length: int = 5

    def start(self, masks: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state before the first mask: a plain pytree of arrays, of the masks' shapes."""
        return {
            "masks": {name: jnp.ones(mask.shape, bool) for name, mask in masks.items()},
            "distances": jnp.full(self.length, jnp.inf, jnp.float32),
            "drawn": jnp.zeros((), jnp.int32),
        }

    def update(self, state: Mapping[str, Any], drawn: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return the state after another mask; may be traced."""
        moved = jnp.where(state["drawn"] > 0, distance(state["masks"], drawn), jnp.inf)
        distances = jnp.roll(state["distances"], -1).at[-1].set(moved)
        return {"masks": dict(drawn), "distances": distances, "drawn": state["drawn"] + 1}

    def found(self, state: Mapping[str, Any]) -> jax.Array:
        """Return whether the ticket is found, a scalar of bool."""
        return (state["distances"] < self.limit).all()
