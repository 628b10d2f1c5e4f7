"""Pruning within a run: when masks are drawn, from what, and how the step keeps them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax import pruning
from evmamba_jax.arrays import Arrays, Variables
from evmamba_jax.config import Config, Duration
from evmamba_jax.errors import UserError
from evmamba_jax.pruning.groups import alive_channels, channels_wanted, lowest_channels
from evmamba_jax.pruning.masks import lowest
from evmamba_jax.pruning.schedules import SCHEDULES
from evmamba_jax.pruning.tickets import further_wanted
from evmamba_jax.training.state import TrainState

ITEM = "pruning"  # of the train state's extra items, and so of checkpoints


class _Weights:
    """Entries of arrays, each pruned by itself: the masks are those of the arrays."""

    def __init__(self, config: Config, params: Mapping[str, Any], trained: Sequence[str]):
        about = config.pruning
        self.paths = tuple(name for name in pruning.prunable(params) if name in set(trained))
        self.shapes = {name: params[name] for name in self.paths}
        self._how = {"scope": about.scope, "factors": _factors(about.factors)}
        if not self.paths:
            raise UserError("config.pruning.method: none of the parameters that are trained is a weight to prune")
        if about.multiple_of != 1:
            raise UserError(f"config.pruning.multiple_of={about.multiple_of} needs config.pruning.structure=channels")

    def wanted(self, sparsity: float) -> list[int]:
        wanted: Any = pruning.zeros_wanted(self.shapes, sparsity, **self._how)
        return [wanted] if isinstance(wanted, int) else [wanted[name] for name in sorted(wanted)]

    def further(self, masks: Arrays, rate: float) -> list[int]:
        return further_wanted(masks, rate, scope=self._how["scope"])

    def lowest(self, scores: Arrays, zeros: jax.Array, masks: Arrays) -> Arrays:
        return lowest(scores, zeros, masks, scope=self._how["scope"])

    def alive(self, params: Arrays) -> Arrays:
        return {name: params[name] != 0 for name in self.paths}

    def over(self, params: Mapping[str, Any], masks: Arrays) -> Arrays:
        del params
        return masks


class _Channels:
    """Channels of a model's groups: the masks are bool (size,) by group, and reach over everything that is tied."""

    def __init__(self, config: Config, params: Mapping[str, Any], trained: Sequence[str], model: Any):
        about = config.pruning
        if about.factors:
            raise UserError("config.pruning.factors are of single weights: leave them out with structure=channels")
        free = set(trained)
        self._groups = [
            group for group in pruning.channels(model) if all(m.path in free or m.statistic for m in group.members)
        ]
        if not self._groups:
            raise UserError("config.pruning.structure=channels: every group of channels has frozen parameters")
        self.paths = tuple(dict.fromkeys(m.path for group in self._groups for m in group.members if m.weight))
        self.shapes = {group.name: jax.ShapeDtypeStruct((group.size,), jnp.float32) for group in self._groups}
        self._scope, self._multiple_of = about.scope, about.multiple_of

    def wanted(self, sparsity: float) -> list[int]:
        return channels_wanted(self.shapes, sparsity, scope=self._scope, multiple_of=self._multiple_of)

    def further(self, masks: Arrays, rate: float) -> list[int]:
        wanted, sizes = further_wanted(masks, rate, scope=self._scope), [masks[name].size for name in sorted(masks)]
        most = [sum(sizes) - len(sizes)] if self._scope == "global" else [size - 1 for size in sizes]
        return [min(pair) for pair in zip(wanted, most, strict=True)]  # one of each group stays

    def lowest(self, scores: Arrays, zeros: jax.Array, masks: Arrays) -> Arrays:
        return lowest_channels(pruning.channel_scores(scores, self._groups), zeros, masks, scope=self._scope)

    def alive(self, params: Arrays) -> Arrays:
        return {group.name: alive_channels(params, group) for group in self._groups}

    def over(self, params: Mapping[str, Any], masks: Arrays) -> Arrays:
        return pruning.channel_masks(params, self._groups, masks)


class Sparse:
    """The masks of a run. Without ``config.pruning.method`` there are none, and nothing here is part of the step.

    Masks are drawn before the steps that :meth:`due` names, by a pure function of step and state. Parameters, moving
    average and moments are masked then. A step masks gradients; zeros that no gradient reaches stay zeros through
    moments, weight decay, trust ratios and averages, so that one multiplication keeps them all.

    Args:
        config: the run's.
        trained: paths of the parameters that change.
        params: their shapes.
        model: abstract, for its groups of channels.
        in_steps: turns lengths into steps.
        total_steps: of the run.

    Attributes:
        active: whether there are masks.

    Raises:
        UserError: lengths that do not fit the run, patterns that match nothing, a method that cannot be.
    """

    def __init__(
        self,
        config: Config,
        trained: Sequence[str],
        params: Mapping[str, Any],
        model: Any,
        *,
        in_steps: Callable[[Duration], int],
        total_steps: int,
    ):
        about = config.pruning
        self.active = bool(about.method)
        self._score = pruning.SCORES[about.score]
        self._starts_from = bool(config.init_from)
        self._drawings: dict[int, float] = {}
        if not self.active:
            return
        if config.tune.method == "lora":
            raise UserError("config.pruning.method needs tune.method=full or head: low-rank additions fill zeros again")
        channels = about.structure == "channels"
        if about.method == "early_bird" and not channels:
            raise UserError("config.pruning.method=early_bird draws masks of channels: set structure=channels")
        self._parts = _Channels(config, params, trained, model) if channels else _Weights(config, params, trained)
        self._drawings = _drawings(config, in_steps, total_steps)
        self._bird = pruning.EarlyBird(about.limit, about.length) if about.method == "early_bird" else None
        self._takes = about.on_ticket == "mask"
        for sparsity in self._drawings.values():
            self._parts.wanted(sparsity)  # refuses what cannot be

    def first(self, params: Arrays) -> dict[str, Any]:
        """Return the item of the state before the first step; what is zero in weights to start from stays zero."""
        if not self.active:
            return {}
        masks = {name: jnp.ones(part.shape, bool) for name, part in self._parts.shapes.items()}
        if self._starts_from:
            masks = self._parts.alive(params)
        item: dict[str, Any] = {"masks": masks, "scores": self._start(params), "steps": jnp.zeros((), jnp.int32)}
        if self._bird is not None:
            length = sum(math.prod(part.shape) for part in self._parts.shapes.values())
            seen = jnp.zeros((len(self._drawings), length), bool)
            item["bird"] = {"now": self._bird.start(masks), "seen": seen, "found": jnp.int32(-1)}
        return {ITEM: item}

    def _start(self, params: Arrays) -> Arrays:
        return self._score.start({name: params[name] for name in self._parts.paths})

    def keep(self, state: TrainState, grads: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """Return the gradients that are left, and the extra items with what the score has seen; traced in the step."""
        if not self.active:
            return grads, state.extra
        item = state.extra[ITEM]
        seen = self._score.accumulate(item["scores"], state.model.params, grads)
        left = pruning.apply(grads, self._parts.over(grads, item["masks"]))
        return left, state.extra | {ITEM: item | {"scores": seen, "steps": item["steps"] + 1}}

    def masks(self, state: TrainState) -> Arrays:
        """Return the masks by the paths of parameters."""
        return self._parts.over(state.model.params, state.extra[ITEM]["masks"])

    def due(self, step: int) -> bool:
        """Return whether masks are drawn before a step."""
        return step in self._drawings

    def figures(self, state: TrainState) -> dict[str, float]:
        """Return what a log line says: ``sparsity`` of the candidates, with early birds ``mask_distance`` too."""
        if not self.active:
            return {}
        masks = state.extra[ITEM]["masks"]
        size = sum(mask.size for mask in masks.values())
        figures = {"sparsity": (size - int(_alive(masks))) / size}
        if self._bird is None:
            return figures
        moved = float(state.extra[ITEM]["bird"]["now"]["distances"][-1])
        return figures | ({"mask_distance": moved} if math.isfinite(moved) else {})

    def told(self, state: TrainState, step: int) -> str:
        """Return what is to be said after the drawing before a step; empty for nothing."""
        if self._bird is None or int(state.extra[ITEM]["bird"]["found"]) != step:
            return ""
        done = "is taken" if self._takes else "is not taken, as config.pruning.on_ticket says"
        return f"early bird: the ticket is found before step {step}, and {done}"

    def birds(self, item: Mapping[str, Any]) -> tuple[list[int], np.ndarray] | None:
        """Return the steps before which early birds were drawn, and the masks (drawings, channels); None without them.

        Args:
            item: of the state, whole on this host.
        """
        if self._bird is None:
            return None
        count = int(item["bird"]["now"]["drawn"])
        return sorted(self._drawings)[:count], np.asarray(item["bird"]["seen"])[:count]

    def draw(self, state: TrainState, zeros: jax.Array) -> TrainState:
        """Return the state with new masks that prune so many; traced."""
        item, masks = state.extra[ITEM], self.further(state, zeros)
        more: dict[str, Any] = {}
        if self._bird is not None:
            bird, drawn = item["bird"], masks
            now = self._bird.update(bird["now"], drawn)
            row = jnp.concatenate([drawn[name].ravel() for name in sorted(drawn)])
            seen = jax.lax.dynamic_update_index_in_dim(bird["seen"], row, bird["now"]["drawn"], 0)
            first = self._bird.found(now) & (bird["found"] < 0)
            masks = {n: jnp.where(first & self._takes, drawn[n], old) for n, old in item["masks"].items()}
            more["bird"] = {"now": now, "seen": seen, "found": jnp.where(first, state.step, bird["found"])}
        return self.with_masks(state, masks, more)

    def further(self, state: TrainState, zeros: jax.Array) -> Arrays:
        """Return masks that prune so many, what a state has pruned among them; traced."""
        item = state.extra[ITEM]
        own = {name: state.model.params[name] for name in self._parts.paths}
        scores = self._score.finished(own, item["scores"], item["steps"])
        return self._parts.lowest(scores, zeros, item["masks"])

    def with_masks(self, state: TrainState, masks: Arrays, more: Mapping[str, Any] | None = None) -> TrainState:
        """Return a state that is pruned by masks as its item has them, whose score begins anew; traced."""
        item = {"masks": masks, "scores": self._start(state.model.params), "steps": jnp.zeros((), jnp.int32)}
        return masked(state, self._parts.over(state.model.params, masks), {ITEM: item | dict(more or {})})

    def zeros(self, step: int) -> jax.Array:
        """Return how many the drawing before a step prunes: of each array or group, or of all together."""
        return jnp.asarray(self._parts.wanted(self._drawings[step]), jnp.int32)

    def zeros_further(self, masks: Arrays, rate: float) -> jax.Array:
        """Return how many the next level prunes, for masks on this host and the share of the living that go."""
        return jnp.asarray(self._parts.further(masks, rate), jnp.int32)


@jax.jit
def _alive(masks: Arrays) -> jax.Array:
    """Return how many entries are kept."""
    return jnp.stack([mask.sum() for mask in masks.values()]).sum()


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
    if about.method == "imp":
        _check_levels(config, in_steps, total_steps)
        return {}
    if about.score != "magnitude" and begin == 0 and about.method != "early_bird":
        raise UserError(
            f"config.pruning.score={about.score!r} looks at gradients, of which there are none at step 0: set "
            "config.pruning.begin"
        )
    if about.method == "early_bird":
        every = in_steps(about.every)
        last = in_steps(about.end) if about.end.steps or about.end.epochs else total_steps
        steps = range(begin or every, last, every)
        if len(steps) <= about.length:
            raise UserError(
                f"config.pruning draws {len(steps)} masks in the run, and length={about.length} distances between them "
                "must be small: draw more often with config.pruning.every, or train longer"
            )
        return dict.fromkeys(steps, about.final)
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


def rewind_step(config: Config, in_steps: Callable[[Duration], int]) -> int:
    """Return the step of the dense level from whose state the levels of iterative pruning start."""
    about = config.pruning.rewind
    return in_steps(about) if config.pruning.reset != "init" and (about.steps or about.epochs) else 0


def _check_levels(config: Config, in_steps: Callable[[Duration], int], total_steps: int) -> None:
    """Refuse what iterative pruning cannot do."""
    about = config.pruning
    if about.factors or about.multiple_of != 1:
        raise UserError(
            "config.pruning.method=imp prunes a share of what is left at each level: leave factors and multiple_of out"
        )
    if config.early_stopping:
        raise UserError("config.pruning.method=imp compares levels of one length: set config.early_stopping to 0")
    at = rewind_step(config, in_steps)
    if at >= total_steps:
        raise UserError(f"config.pruning.rewind is step {at}, and the run has {total_steps}: rewind to an earlier one")
