"""Everything that a run changes, as one pytree."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from evmamba_jax.arrays import Variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run needs to continue to the bit.

    Attributes:
        model: parameters and batch statistics.
        ema: their moving average; None in a run without one.
        opt_state: of the optimizer.
        step: int32, updates made.
        window: float32 sums since the last log line, by name, so that a resumed run logs the same numbers.
        last: float32 loss and gradient norm of the last step, finite or not.
        extra: further items by name, such as masks. The step passes them on; they are placed on the mesh, saved and
            restored like everything else, each as an item of its own in the checkpoint.
    """

    model: Variables
    ema: Variables | None
    opt_state: Any
    step: jax.Array
    window: dict[str, jax.Array]
    last: dict[str, jax.Array]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def items(self) -> dict[str, Any]:
        """Return the state as the items of a checkpoint; :meth:`of_items` is the inverse."""
        train = {"step": self.step, "opt_state": self.opt_state, "window": self.window, "last": self.last}
        ema = {} if self.ema is None else {"ema": self.ema.asdict()}
        return {"model": self.model.asdict(), **ema, "train": train, **self.extra}

    @classmethod
    def of_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """Put a state together from the items of a checkpoint."""
        extra = {name: item for name, item in items.items() if name not in ("model", "ema", "train")}
        ema = Variables(**items["ema"]) if "ema" in items else None
        return cls(Variables(**items["model"]), ema, **items["train"], extra=extra)


def init_state(
    model: Variables,
    opt_state: Any,
    *,
    ema: bool,
    parts: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> TrainState:
    """Return the state before the first step.

    Args:
        model: its initial values.
        opt_state: of the optimizer, for the parameters that are trained.
        ema: whether to keep a moving average.
        parts: names of the loss's parts.
        extra: further items of the state.
    """
    zero = lambda *names: {name: jnp.zeros(()) for name in names}  # noqa: E731
    return TrainState(
        model=model,
        ema=jax.tree.map(jnp.copy, model) if ema else None,
        opt_state=opt_state,
        step=jnp.zeros((), jnp.int32),
        window=zero("loss", "grad_norm", *parts, "corrupt", "steps"),
        last=zero("loss", "grad_norm"),
        extra=dict(extra or {}),
    )
