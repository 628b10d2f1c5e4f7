"""Model names and how to build them."""

import fnmatch
import inspect
import logging
from os import PathLike
from typing import Any

import jax
from flax import nnx

from evmamba_jax.arrays import Arrays, check_same_shapes, fill, merge, split
from evmamba_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

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
        pretrained: folder of a converted model, of a training run, or of one of its checkpoints. Where the family's
            ``adopt`` says so, it may be of another shape: a model without a head, such as a backbone, takes a
            classifier, Vim a position embedding of another grid.
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
        model = abstract_model(name, **options)
        fill(model, *load_pretrained(model, pretrained, name)[:2])
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


def load_pretrained(
    model: Any, directory: str | PathLike[str], name: str, *, ema: bool = False, new_head: bool = False
) -> tuple[Arrays, Arrays, dict[str, Any]]:
    """Return parameters, batch statistics and meta of a checkpoint as a model takes them.

    Args:
        model: the model, which may be abstract; its ``adopt`` says what it takes from the checkpoint of another shape.
        directory: folder of a converted model, of a training run, or of one of its checkpoints.
        name: what an error calls the model.
        ema: take the moving average.
        new_head: where the number of classes is another, leave the head out of what is returned.

    Raises:
        UserError: a checkpoint that is missing, or of another model, other shapes or, without ``new_head``, another
            number of classes.
    """
    from evmamba_jax import checkpoints

    params, batch_stats, meta = checkpoints.load_model(directory, ema=ema)
    given_name, model_name = f"checkpoint {directory}", f"model {name}"
    classes = params["head.bias"].size if "head.bias" in params else None
    model = for_classes(model, classes, given_name, model_name, new_head=new_head)
    adopted = model.adopt({**params, **batch_stats})
    _, params, batch_stats = split(model)
    check_same_shapes({**params, **batch_stats}, adopted, given_name, model_name)
    return {path: adopted[path] for path in params}, {path: adopted[path] for path in batch_stats}, meta


def for_classes(model: Any, classes: int | None, given_name: str, model_name: str, *, new_head: bool) -> Any:
    """Return the model as it takes weights for a number of classes: itself, or with ``new_head`` without its own.

    Raises:
        UserError: the weights are for another number of classes (None: they have no head) and ``new_head`` is not set.
    """
    bias = split(model).params.get("head.bias")
    if classes is None or bias is None or classes == bias.size:
        return model
    if not new_head:
        raise UserError(
            f"{given_name} has {classes} classes and {model_name} has {bias.size}; the two must be the same"
        )
    logger.warning(
        "%s has %d classes: the head of %s, with %d, starts anew", given_name, classes, model_name, bias.size
    )
    headless = merge(*split(model))
    headless.head = None
    return headless
