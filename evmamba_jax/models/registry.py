"""Model names and how to build them."""

import fnmatch
import inspect
from typing import Any

import jax
from flax import nnx

from evmamba_jax.errors import UserError, nearest

_VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {}  # the class and its sizes


def register(name: str, family: type[nnx.Module], **defaults: Any) -> None:
    """Enter a variant: ``create_model(name, **options)`` builds ``family(**defaults | options)``."""
    _VARIANTS[name] = (family, defaults)


def list_models(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell ``pattern``, sorted."""
    return fnmatch.filter(sorted(_VARIANTS), pattern)


def build_model(name: str, *, rngs: nnx.Rngs | None = None, **options: Any) -> Any:
    """Build a model in evaluation mode with the official initial values; arguments as for ``create_model``."""
    if name not in _VARIANTS:
        raise UserError(f"unknown model {name!r}{nearest(name, _VARIANTS)}; known: {', '.join(sorted(_VARIANTS))}")
    family, defaults = _VARIANTS[name]
    allowed = inspect.signature(family.__init__).parameters.keys() - {"self", "rngs"}
    for option in options:
        if option not in allowed:
            raise UserError(
                f"unknown option {option!r} of model {name}{nearest(option, allowed)}; "
                f"allowed: {', '.join(sorted(allowed))}"
            )

    model = family(**{**defaults, **options}, rngs=rngs or nnx.Rngs(0))
    model.eval()
    return model


def abstract_model(name: str, **options: Any) -> Any:
    """Build a model as :func:`build_model` does, but of shapes: ``jax.ShapeDtypeStruct`` stands for every array."""

    def build() -> nnx.Module:
        rngs: Any = nnx.Rngs(0)
        rngs.params = _SameKey(0, tag="params")
        return build_model(name, rngs=rngs, **options)

    return nnx.eval_shape(build)


class _SameKey(nnx.RngStream):
    """A stream of random keys that stands still: shapes need no randomness, and tracing it takes most of the time."""

    def __call__(self) -> jax.Array:
        return self.key[...]
