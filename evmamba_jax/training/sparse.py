"""Pruning within a run: when masks are drawn, from what, and how the step keeps them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from evmamba_jax import pruning
from evmamba_jax.arrays import Arrays, Variables
from evmamba_jax.config import Config, Duration
from evmamba_jax.errors import UserError
from evmamba_jax.pruning.masks import lowest
from evmamba_jax.pruning.schedules import SCHEDULES
from evmamba_jax.training.state import TrainState

ITEM = "pruning"  # of the train state's extra items, and so of checkpoints


class Sparse:
    """The masks of a run. Without ``config.pruning.method`` there are none, and nothing here is part of the step.

    Masks are drawn before the steps that :meth:`due` names, by a pure function of step and state. Parameters, moving
    average and moments are masked then. A step masks gradients; zeros that no gradient reaches stay zeros through
    moments, weight decay, trust ratios and averages, so that one multiplication keeps them all.

    Args:
        config: the run's.
        trained: paths of the parameters that change.
        params: their shapes.
        in_steps: turns lengths into steps.
        total_steps: of the run.

    Attributes:
        paths: of the parameters that may be pruned; empty without a method.

    Raises:
        UserError: lengths that do not fit the run, patterns that match nothing, a method that cannot be.
    """

    def __init__(
        self,
        config: Config,
        trained: Sequence[str],
        params: Mapping[str, Any],
        *,
        in_steps: Callable[[Duration], int],
        total_steps: int,
    ):
        about = config.pruning
        self.score = pruning.SCORES[about.score]
        self.starts_from = bool(config.init_from)
        self.paths: tuple[str, ...] = ()
        self._drawings: dict[int, float] = {}
        if not about.method:
            return
        if config.tune.method == "lora":
            raise UserError("config.pruning.method needs tune.method=full or head: low-rank additions fill zeros again")
        self.paths = tuple(name for name in pruning.prunable(params) if name in set(trained))
        self._shapes = {name: params[name] for name in self.paths}
        self._scope, self._factors = about.scope, _factors(about.factors)
        if not self.paths:
            raise UserError("config.pruning.method: none of the parameters that are trained is a weight to prune")
        self._drawings = _drawings(config, in_steps, total_steps)
        for sparsity in self._drawings.values():
            self._wanted(sparsity)  # refuses what cannot be

    def first(self, params: Arrays) -> dict[str, Any]:
        """Return the item of the state before the first step; what is zero in weights to start from stays zero."""
        if not self.paths:
            return {}
        own = {name: params[name] for name in self.paths}
        masks = {name: p != 0 if self.starts_from else jnp.ones(p.shape, bool) for name, p in own.items()}
        return {ITEM: {"masks": masks, "scores": self.score.start(own), "steps": jnp.zeros((), jnp.int32)}}

    def keep(self, state: TrainState, grads: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """Return the gradients that are left, and the extra items with what the score has seen; traced in the step."""
        if not self.paths:
            return grads, state.extra
        item = state.extra[ITEM]
        own = {name: state.model.params[name] for name in self.paths}
        seen = self.score.accumulate(item["scores"], own, grads)
        left = pruning.apply(grads, item["masks"])
        return left, state.extra | {ITEM: item | {"scores": seen, "steps": item["steps"] + 1}}

    def due(self, step: int) -> bool:
        """Return whether masks are drawn before a step."""
        return step in self._drawings

    def sparsity(self, step: int) -> float:
        """Return the share of zeros, among what may be pruned, that the schedule wants before a step."""
        latest = max((at for at in self._drawings if at < step), default=None)
        if latest is None:
            return 0.0
        wanted = self._wanted(self._drawings[latest])
        return sum(wanted) / sum(math.prod(array.shape) for array in self._shapes.values())

    def draw(self, state: TrainState, zeros: jax.Array) -> TrainState:
        """Return the state with new masks that leave these many zeros; traced."""
        item = state.extra[ITEM]
        own = {name: state.model.params[name] for name in self.paths}
        scores = self.score.finished(own, item["scores"], item["steps"])
        masks = lowest(scores, zeros, item["masks"], scope=self._scope)
        new = {"masks": masks, "scores": self.score.start(own), "steps": jnp.zeros_like(item["steps"])}
        return masked(state, masks, {ITEM: new})

    def zeros(self, step: int) -> jax.Array:
        """Return how many zeros the drawing before a step leaves: of each array, or of all together."""
        return jnp.asarray(self._wanted(self._drawings[step]), jnp.int32)

    def _wanted(self, sparsity: float) -> list[int]:
        wanted = pruning.zeros_wanted(self._shapes, sparsity, scope=self._scope, factors=self._factors)
        return [wanted] if isinstance(wanted, int) else [wanted[name] for name in sorted(wanted)]


def masked(state: TrainState, masks: Mapping[str, jax.Array], extra: Mapping[str, Any]) -> TrainState:
    """Return a state with parameters, moving average and moments masked, and other extra items."""
    of = lambda model: Variables(pruning.apply(model.params, masks), model.batch_stats)  # noqa: E731
    return TrainState(
        model=of(state.model),
        ema=None if state.ema is None else of(state.ema),
        opt_state=pruning.mask_moments(state.opt_state, masks),
        step=state.step,
        window=state.window,
        last=state.last,
        extra=state.extra | dict(extra),
    )


def _factors(given: Sequence[str]) -> dict[str, float]:
    """Read "pattern=factor"."""
    factors = {}
    for text in given:
        pattern, _, factor = text.rpartition("=")
        try:
            factors[pattern] = float(factor)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UserError(f"config.pruning.factors has {text!r}: write PATTERN=FACTOR, e.g. head.kernel=0.5")
    return factors


def _drawings(config: Config, in_steps: Callable[[Duration], int], total_steps: int) -> dict[int, float]:
    """Return the sparsity of each drawing by the step before which it is."""
    about = config.pruning
    begin = about.begin.steps or (in_steps(about.begin) if about.begin.epochs else 0)
    if about.method == "keep":
        if not config.init_from:
            raise UserError("config.pruning.method=keep keeps the zeros of init_from: set config.init_from")
        return {}
    if about.score != "magnitude" and begin == 0:
        raise UserError(
            f"config.pruning.score={about.score!r} looks at gradients, of which there are none at step 0: set "
            "config.pruning.begin"
        )
    if about.method == "one_shot":
        if begin >= total_steps:
            raise UserError(f"config.pruning.begin is step {begin}, and the run has {total_steps}: begin earlier")
        return {begin: about.final}
    end, every = in_steps(about.end), in_steps(about.every)
    if not (about.end.steps or about.end.epochs):
        raise UserError("config.pruning.end is not set: set steps or epochs")
    if not begin < end < total_steps:
        raise UserError(
            f"config.pruning goes from step {begin} to step {end}, and the run has {total_steps}: the first must come "
            "before the second, and the second before the run's last"
        )
    rule = SCHEDULES[about.schedule](about.initial, about.final, begin, end)
    return {step: rule(step) for step in (*range(begin, end, every), end)}
