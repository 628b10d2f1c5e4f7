"""Lottery tickets: the masks of the next level, and how far apart two solutions lie."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax.errors import UserError
from evmamba_jax.pruning.masks import Masks, lowest


def loss_barrier(loss: Callable[[Any], Any], params_a: Any, params_b: Any, points: int = 11) -> float:
    """Return how far the loss rises above the straight line between two solutions; 0 if it never does.

    Args:
        loss: of a pytree of parameters.
        params_a: the first solution.
        params_b: the second, of the same structure.
        points: on the line, both ends with it.

    Source: Frankle et al., Linear mode connectivity (arXiv:1912.05671); Paul et al. (arXiv:2210.03044).
    """
    shares = np.linspace(0, 1, points)
    losses = [float(loss(jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, params_a, params_b))) for t in shares]
    return barrier(shares, losses)


def barrier(shares: Any, losses: Any) -> float:
    """Return the barrier of losses (N,) at shares (N,) of the way, of which the first is 0 and the last 1."""
    shares, losses = np.asarray(shares, np.float64), np.asarray(losses, np.float64)
    return float(np.max(losses - ((1 - shares) * losses[0] + shares * losses[-1])))


def further(scores: Mapping[str, jax.Array], rate: float, masks: Mapping[str, jax.Array] | None = None) -> Masks:
    """Return the masks of the next level: ``round(rate * alive)`` more of all arrays together, the lowest scores.

    Args:
        scores: by path, the magnitudes as a rule.
        rate: share of the living that go, 0 to 1.
        masks: of the level before; None for the first.

    Source: Frankle et al., Stabilizing the lottery ticket hypothesis (arXiv:1903.01611). open_lth prunes one more.
    """
    before = {name: jnp.ones(array.shape, bool) for name, array in scores.items()} if masks is None else masks
    wanted = further_wanted(before, rate, scope="global")
    found = lowest(scores, jnp.asarray(wanted, jnp.int32), before, scope="global")
    return {name: found[name] for name in scores}


def further_wanted(masks: Mapping[str, Any], rate: float, *, scope: str) -> list[int]:
    """Return how many zeros the next level has: in each array by sorted names, or in all together.

    Args:
        masks: of the level before.
        rate: share of the living that go, 0 to 1.
        scope: "layer" or "global".
    """
    if not 0 < rate < 1:
        raise UserError(f"rate={rate!r} is not allowed: it must be above 0 and below 1")
    counts = [(int(masks[name].sum()), masks[name].size) for name in sorted(masks)]
    if scope == "global":
        counts = [(sum(alive for alive, _ in counts), sum(size for _, size in counts))]
    return [size - alive + round(rate * alive) for alive, size in counts]
