"""Models by name, with initial values or with weights."""

from os import PathLike
from typing import Any, Literal

from flax import nnx

from evmamba_jax.models import abstract_model, build_model


def create_model(
    name: str,
    *,
    pretrained: str | PathLike[str] | None = None,
    ema: bool | Literal["better"] = "better",
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Any:
    """Build a model in evaluation mode, with the official initial values or with the weights of a place.

    Weights for another number of classes start a new head, and Vim's position embedding of another grid of patches is
    resized; a line says so. A model without a head, such as a backbone, takes a classifier without its head.

    Args:
        name: one of :func:`list_models`.
        pretrained: a file of official weights (.pth, .pth.tar, .ckpt, .bin, .safetensors); or a folder: a converted
            model, a training run (which stands for its newest checkpoint, or with early stopping its best), or one of
            its checkpoints; or ``hf-hub:owner/name[@revision]``; or ``official``, the released file of the model's
            card.
        ema: False takes the parameters of a run, True their moving average. "better" takes what the checkpoint's own
            evaluation found better; in a tie, and without an evaluation of both at this step, the parameters.
        rngs: source of the initial values; ``nnx.Rngs(0)`` when not given.
        **options: fields of the family's configuration (``num_classes``, ``in_channels``, ``drop_path_rate``,
            ``dtype``, its sizes, ...).

    Returns:
        An NNX module: ``model(images)`` gives logits, ``model.features(images)`` the stage maps.

    Raises:
        UserError: unknown name or option; weights that are missing, damaged, or of another model or other shapes.
    """
    if pretrained is None:
        return build_model(name, rngs=rngs, **options)
    # Orbax takes a second to import; only who reads weights waits for it.
    from evmamba_jax.weights.load import fill_model, inner_of, load_weights

    if "inner" not in options:
        options |= inner_of(pretrained, name)
    model = abstract_model(name, **options)
    initial = lambda: build_model(name, rngs=rngs, **options)  # noqa: E731
    weights = load_weights(model, pretrained, name, variant=name, ema=ema, initial=initial)
    fill_model(model, weights)
    return model
