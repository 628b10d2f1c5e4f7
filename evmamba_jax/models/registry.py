"""The variants by name: a class, a frozen configuration, and a card with what is published about it."""

import dataclasses
import fnmatch
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from evmamba_jax.errors import UserError, nearest, one_of
from evmamba_jax.layers.backbone import BackboneConfig, PlainConfig
from evmamba_jax.layers.channels import keep_first


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The facts about one model and its official weights; tests compute parameters and FLOPs again.

    Accuracies and FLOPs are from the official READMEs and, where they differ, of the released weights, not the paper.

    Attributes:
        name: as :func:`evmamba_jax.create_model` takes it; given by :func:`register`.
        parameters: trained parameters, with the head of 1000 classes.
        flops: multiply-adds of one image of ``input_size``, by :func:`evmamba_jax.analysis.count_flops`.
        published_flops: multiply-adds as published, by the authors' counter; None where there is no figure.
        top1: published top-1 accuracy on ImageNet-1K's validation images, in percent.
        top5: the same for top-5; None where there is no figure.
        source: address of the official weights, or of the page that offers them.
        checkpoint: name of the file; None where the page alone tells.
        paper: arXiv identifier.
        licence: of the official weights, by its SPDX identifier, or "none stated".
        licence_note: where that is stated, and what follows.
        note: what else to know about the weights and figures.
        input_size: (height, width) of the images, in pixels.
        crop: side of the evaluation crop over the side that images are resized to.
        crop_mode: "center" resizes the short side to ``input_size / crop`` and cuts out the middle; "squash" resizes
            both sides to that, whatever their ratio, and cuts out the middle.
        interpolation: of that resizing.
        mean: what is subtracted from red, green and blue, which go from 0 to 1.
        std: what they are then divided by.
    """

    name: str = dataclasses.field(default="", kw_only=True)
    parameters: int
    flops: int
    published_flops: float | None
    top1: float
    top5: float | None
    source: str
    checkpoint: str | None
    paper: str
    licence: str
    licence_note: str
    note: str = ""
    input_size: tuple[int, int] = (224, 224)
    crop: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class Variant(NamedTuple):
    """A registered model."""

    family: type[Any]
    config: BackboneConfig
    card: ModelCard | None  # None: nothing is published of it on ImageNet


VARIANTS: dict[str, Variant] = {}  # in the order of the families and their sizes


def register(name: str, family: type[Any], config: BackboneConfig, card: ModelCard | None = None) -> None:
    """Enter a variant: ``create_model(name, **options)`` builds ``family`` of ``config`` with these options changed.

    An address in the card that ends in a slash is a folder that holds the file; any other is a page that offers it.
    A model for experiments has no card.
    """
    if card is None:
        VARIANTS[name] = Variant(family, config, None)
        return
    folder = card.source.endswith("/")
    source = card.source + (card.checkpoint or "") if folder else card.source
    VARIANTS[name] = Variant(family, config, dataclasses.replace(card, name=name, source=source))


def list_models(pattern: str = "*", *, without_card: bool = False) -> list[str]:
    """Return the registered names that match a shell ``pattern``, sorted.

    Args:
        pattern: of the names.
        without_card: also name models for experiments, of which nothing is published on ImageNet.
    """
    return fnmatch.filter(sorted(name for name, variant in VARIANTS.items() if variant.card or without_card), pattern)


def model_card(name: str) -> ModelCard:
    """Return the card of one of :func:`list_models`; raises a UserError for an unknown name, or one without a card."""
    card = one_of("model", name, VARIANTS).card
    if card is None:
        raise UserError(f"model {name!r} has no card: it is for experiments, and no weights for ImageNet are released")
    return card


def input_size(name: str) -> tuple[int, int]:
    """Return (height, width) of the images that a variant is made for: its card's, else its configuration's."""
    _, config, card = one_of("model", name, VARIANTS)
    if card is not None:
        return card.input_size
    assert isinstance(config, PlainConfig), f"{name} needs a card, or an image_size"
    height, width = config.sides
    return height, width


def build_model(name: str, *, rngs: nnx.Rngs | None = None, **options: Any) -> Any:
    """Build a model in evaluation mode with the official initial values; arguments as for ``create_model``."""
    config = configuration(name, **options)
    if not isinstance(rngs, nnx.Rngs | None):
        raise UserError(f"rngs={rngs!r} is not allowed: it must be an nnx.Rngs, e.g. nnx.Rngs(0), or None")
    model: Any = VARIANTS[name].family(config, rngs=rngs or nnx.Rngs(0))
    keep_first(model, config.inner)
    model.eval()
    return model


def configuration(name: str, **options: Any) -> BackboneConfig:
    """Return a variant's configuration with some options changed; raises a UserError for what cannot be."""
    if not isinstance(name, str) or name not in VARIANTS:
        near = nearest(str(name), VARIANTS)
        raise UserError(f"unknown model {name!r}{near}; known: {', '.join(sorted(VARIANTS))}")
    config = VARIANTS[name].config
    allowed = sorted(field.name for field in dataclasses.fields(config))
    for option in options:
        if option not in allowed:
            near = nearest(option, allowed)
            raise UserError(f"unknown option {option!r} of model {name}{near}; allowed: {', '.join(allowed)}")
    return dataclasses.replace(config, **options)


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
