"""Model names and how to build them."""

import fnmatch
import inspect
from os import PathLike
from typing import Any

import jax
from flax import nnx

from evmamba_jax import functional
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.layers.pyramid import CLASSIFIER_ONLY, initial_out_norms

_VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {}  # the class and its sizes


def register(name: str, family: type[nnx.Module], **defaults: Any) -> None:
    """Enter a variant: ``create_model(name, **options)`` builds ``family(**defaults | options)``."""
    _VARIANTS[name] = (family, defaults)


def list_models(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell ``pattern``, sorted."""
    return fnmatch.filter(sorted(_VARIANTS), pattern)


def create_model(
    name: str, *, pretrained: str | PathLike[str] | None = None, rngs: nnx.Rngs | None = None, **options: Any
) -> Any:
    """Build a model in evaluation mode, with the official initial values or with those of a checkpoint.

    Args:
        name: one of :func:`list_models`.
        pretrained: folder of a converted model, of a training run, or of one of its checkpoints. A backbone
            (``out_norms=True``) takes the weights of a classifier: without its last norm and head, out norms 1 and 0.
        rngs: source of the initial values; ``nnx.Rngs(0)`` when not given.
        **options: arguments of the family's class (``num_classes``, ``in_channels``, ``drop_path_rate``, ``dtype``
            and its sizes).

    Returns:
        An NNX module: ``model(images)`` gives logits, ``model.features(images)`` the stage maps.

    Raises:
        UserError: unknown name or option; a checkpoint that is missing, or of another model or other shapes.
    """
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

    if pretrained is None:
        model = family(**{**defaults, **options}, rngs=rngs or nnx.Rngs(0))
    else:
        model = _restored(functional.split(abstract_model(name, **options)), pretrained, name)
    model.eval()
    return model


def abstract_model(name: str, **options: Any) -> Any:
    """Build a model as :func:`create_model` does, but of shapes: ``jax.ShapeDtypeStruct`` stands for every array."""

    def build() -> nnx.Module:
        rngs: Any = nnx.Rngs(0)
        rngs.params = _SameKey(0, tag="params")
        return create_model(name, rngs=rngs, **options)

    return nnx.eval_shape(build)


class _SameKey(nnx.RngStream):
    """A stream of random keys that stands still: shapes need no randomness, and tracing it takes most of the time."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def _restored(target: functional.Split, directory: str | PathLike[str], name: str) -> nnx.Module:
    from evmamba_jax import checkpoint

    params, batch_stats, _ = checkpoint.load_model(directory)
    fresh = initial_out_norms(target.params)
    if fresh and fresh.keys().isdisjoint(params):
        params = {path: a for path, a in params.items() if not path.startswith(CLASSIFIER_ONLY)} | fresh
        batch_stats = {path: a for path, a in batch_stats.items() if not path.startswith(CLASSIFIER_ONLY)}
    functional.check_same_shapes(
        {**target.params, **target.batch_stats}, {**params, **batch_stats}, f"checkpoint {directory}", f"model {name}"
    )
    return functional.merge(target.graphdef, params, batch_stats)
