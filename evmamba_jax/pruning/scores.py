"""What an entry of a parameter is worth; the lowest go first."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Arrays = Mapping[str, jax.Array]


class Score(NamedTuple):
    """How worth is told, over the steps since the last mask was drawn.

    Attributes:
        add: (sum, parameter, gradient) -> the sum after a step; None where gradients are not looked at.
        finish: (parameter, sum, steps) -> the score. Without ``add`` the sum is None.
    """

    add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None
    finish: Callable[[jax.Array, Any, jax.Array], jax.Array]

    def start(self, params: Arrays) -> dict[str, jax.Array]:
        """Return sums of nothing, float32 or wider; none where gradients are not looked at."""
        if self.add is None:
            return {}
        return {name: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for name, p in params.items()}

    def accumulate(self, sums: Arrays, params: Arrays, grads: Arrays) -> dict[str, jax.Array]:
        """Return the sums with a step's dense gradients, of the parameters that the step began with."""
        if self.add is None:
            return {}
        wide = {name: (params[name].astype(s.dtype), grads[name].astype(s.dtype)) for name, s in sums.items()}
        return {name: self.add(s, *wide[name]) for name, s in sums.items()}

    def finished(self, params: Arrays, sums: Arrays, steps: jax.Array) -> dict[str, jax.Array]:
        """Return the scores of parameters after some steps."""
        return {name: self.finish(p, sums.get(name), steps) for name, p in params.items()}


SCORES = {
    # |w|
    "magnitude": Score(None, lambda w, _sum, _steps: jnp.abs(w)),
    # the mean of |g|
    "gradient": Score(lambda s, _w, g: s + jnp.abs(g), lambda _w, s, steps: s / steps),
    # |w times the mean of g|: Lee et al., SNIP (arXiv:1810.02340); Molchanov et al. (arXiv:1611.06440)
    "taylor": Score(lambda s, _w, g: s + g, lambda w, s, steps: jnp.abs(w * (s / steps))),
    # minus the sum of w times g: Sanh et al., Movement pruning (arXiv:2005.07683)
    "movement": Score(lambda s, w, g: s - w * g, lambda _w, s, _steps: s),
}
