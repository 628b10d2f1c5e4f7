"""What the families share: their options, the walk from stem to head, and what it asks of the images."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax import ranges
from evmamba_jax.errors import UserError
from evmamba_jax.layers.blocks import REMAT, run_blocks
from evmamba_jax.layers.drop_path import drop_path_rates, fold_in
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.patches import Stem
from evmamba_jax.layers.projections import Linear
from evmamba_jax.ranges import chosen, ranged, stated
from pallas_kernels.selective_scan import IMPLEMENTATIONS


def _are_sizes(pairs: Any) -> bool:
    return isinstance(pairs, tuple) and all(
        isinstance(pair, tuple) and [type(part) for part in pair] == [str, int] and pair[1] > 0 for pair in pairs
    )


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The options that every family has; each adds its own.

    Attributes:
        num_classes: outputs of the head; 0 leaves it out, and the model returns what would enter it.
        in_channels: channels of the images.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks.
        dtype: compute type, e.g. ``jnp.bfloat16``; None takes the promoted type of images and parameters. Parameters,
            time steps, decays, the recurrence, softmax and all statistics stay float32 or wider.
        remat: what the backward pass finds of a block's activations: "none" (all), "block" (only the block's input) or
            "dots_and_scans" (results of matrix products and scans too); it computes the others again.
        implementation: of the scans, as :func:`pallas_kernels.scan2d` takes it; None chooses by platform.
        inner: channels that are left of some groups, as (name, number) pairs; what :func:`evmamba_jax.pruning.cut`
            leaves. The names are those of :func:`evmamba_jax.pruning.channels`, e.g. "blocks.0.mixer".

    Raises:
        UserError: an option that cannot be.
    """

    num_classes: int = ranged(1000, least=0)
    in_channels: int = ranged(3, least=1)
    drop_path_rate: float = ranged(0.0, least=0, below=1)
    dtype: Dtype | None = stated(None, "a floating-point type of 16 bits or more, or None", ranges.is_dtype)  # noqa: RUF009
    remat: str = chosen("none", REMAT)
    implementation: str | None = chosen(None, IMPLEMENTATIONS)
    inner: Sequence[tuple[str, int]] = stated((), "pairs of a group's name and a number", _are_sizes)

    def __post_init__(self):
        # A configuration is part of a model's structure, which JAX compares and hashes.
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, ranges.plain(getattr(self, field.name)))
        ranges.check(self)

    def pick(self, *names: str) -> dict[str, Any]:
        """Return some of the options by name, for a layer that has them too."""
        return {name: getattr(self, name) for name in names}


class Backbone(nnx.Module):
    """A model of images: ``features(images, key=None)`` gives its maps, ``model(images, key=None)`` its logits.

    Attributes:
        config: its options.
    """

    def __init__(self, config: Any):
        self.config = config
        self.in_channels = config.in_channels
        self.deterministic = True  # which model.train() and model.eval() set


class Stage(nnx.Module):
    """Blocks of one resolution, and the downsampling to the next (the last stage has none)."""

    def __init__(self, blocks: Sequence[nnx.Module], downsample: nnx.Module | None, *, remat: str = "none"):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample
        self.remat = remat
        self.deterministic = True

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) through the blocks to (B, H, W, C); ``key`` draws the drop path in training mode."""
        return self.run(x, key)

    def run(self, x: jax.Array, key: jax.Array | None, *, first: int = 0, end: int | None = None) -> jax.Array:
        """Map x (B, ..., C) through the blocks from ``first`` to before ``end`` (None: to the last)."""
        options = {"training": not self.deterministic, "remat": self.remat}
        return run_blocks(self.blocks[first:end], x, key, **options, first=first)


@dataclasses.dataclass(frozen=True)
class StagedConfig(BackboneConfig):
    """The options of a family of four stages.

    Attributes:
        width: channels C of the first stage; every stage doubles them.
        depths: blocks of each stage.
        out_norms: build the official backbone for detection and segmentation: ``features()`` passes each map through
            a LayerNorm of its own, and the last norm and the head are left out.
    """

    STAGES: ClassVar[int] = 4

    width: int = ranged(96, least=1)
    depths: Sequence[int] = ranged((2, 2, 4, 2), least=0)
    out_norms: bool = False

    def __post_init__(self):
        super().__post_init__()
        if len(self.depths) != self.STAGES:
            stages = "four" if self.STAGES == 4 else self.STAGES
            raise UserError(f"depths must name the blocks of {stages} stages, e.g. (2, 2, 4, 2); got {self.depths}")
        for name in ("ssm_ratio", "mlp_ratio", "ffn_ratio"):
            if 0 < getattr(self, name, 0) * self.width < 1:
                raise UserError(f"{name}={getattr(self, name)} of width={self.width} leaves no channel: enlarge it")


class StagedBackbone(Backbone):
    """Stem, stages of blocks with a downsampling between, a norm at every pixel, their mean, a linear head.

    Args:
        config: the options.
        patch_embed: the stem, from images of at least its ``smallest`` side to (B, h, w, C) of the first stage.
        block: makes a block from the number of its stage, its own number in it, C of the stage and its drop path.
        downsample: makes the downsampling of a stage of C channels; it doubles them.
        norm: the last norm.
        pool: makes, from C of the last stage, what maps (B, h, w, C) to (B, C); None for the mean.
        stage: makes a stage from its number, its blocks, its downsampling (None for the last), and ``remat``.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        config: StagedConfig,
        patch_embed: Stem,
        block: Callable[[int, int, int, float], nnx.Module],
        downsample: Callable[[int], nnx.Module],
        *,
        norm: Callable[..., Any] = LayerNorm,
        pool: Callable[[int], Any] | None = None,
        stage: Callable[..., Stage] = lambda _, *parts, **options: Stage(*parts, **options),
        rngs: nnx.Rngs,
    ):
        super().__init__(config)
        widths = [config.width * 2**i for i in range(len(config.depths))]
        self.patch_embed = patch_embed
        stages = []
        for i, rates in enumerate(drop_path_rates(config.drop_path_rate, config.depths)):
            blocks = [block(i, j, widths[i], rate) for j, rate in enumerate(rates)]
            halve = downsample(widths[i]) if i + 1 < len(widths) else None
            stages.append(stage(i, blocks, halve, remat=config.remat))
        self.stages = nnx.List(stages)
        layer = {"dtype": config.dtype, "rngs": rngs}
        self.out_norms = nnx.List([LayerNorm(c, **layer) for c in widths]) if config.out_norms else None
        self.norm = None if config.out_norms else norm(widths[-1], **layer)
        self.pool = None if pool is None or config.out_norms else pool(widths[-1])
        has_head = config.num_classes and not config.out_norms
        self.head = Linear(widths[-1], config.num_classes, **layer) if has_head else None

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """Return the stage maps [(B, h, w, C), ...], each before its downsampling.

        Args:
            images: (B, H, W, in_channels) normalised floats of any size that the stem takes, odd ones included.
            key: random key for drop path; needed in training mode when ``drop_path_rate`` is not zero.

        Raises:
            UserError: images of another rank, another number of channels, or too small.
        """
        check_images(images, self.in_channels, self.patch_embed.smallest)
        x = self.patch_embed(images)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x, fold_in(key, i))
            maps.append(x if self.out_norms is None else self.out_norms[i](x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits (B, num_classes); arguments and errors as for :meth:`features`."""
        if self.norm is None:
            raise UserError("this model was built with out_norms=True, a backbone without a head: call its features()")
        x = self.norm(self.features(images, key=key)[-1])
        x = x.mean((1, 2)) if self.pool is None else self.pool(x)
        return x if self.head is None else self.head(x)


@dataclasses.dataclass(frozen=True)
class PlainConfig(BackboneConfig):
    """The options of a family whose blocks all see one sequence of tokens, a token a patch.

    Attributes:
        width: channels C of the tokens.
        depth: blocks.
        image_size: side, or (height, width), of the images that the model is made for; pixels.
        patch_size: side of a patch.
        squeeze_excite: C over the channels of a gate on the mixer's output, made from its mean over all tokens; None
            for no gate.

    Raises:
        UserError: no blocks, an image_size below one patch, a squeeze_excite above the width.
    """

    width: int = ranged(192, least=1)
    depth: int = ranged(24, least=1)
    image_size: int | Sequence[int] = ranged(224, least=1)
    patch_size: int = ranged(16, least=1)
    squeeze_excite: int | None = ranged(None, least=1)

    def __post_init__(self):
        super().__post_init__()
        if len(self.sides) != 2 or min(self.sides) < self.patch_size:
            raise UserError(
                f"image_size is {self.image_size!r}: give a side or (height, width) of at least "
                f"patch_size={self.patch_size}"
            )
        if (self.squeeze_excite or 1) > self.width:
            raise UserError(f"squeeze_excite={self.squeeze_excite} leaves no channel: take width={self.width} at most")

    @property
    def sides(self) -> tuple[int, ...]:
        """``image_size`` as (height, width)."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of ``image_size``."""
        return self.grid_of(*self.sides)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of this size; pixels beyond the last whole patch are left out."""
        return height // self.patch_size, width // self.patch_size


class PlainBackbone(Backbone):
    """Patches as one sequence of tokens, through all of ``blocks``.

    Attributes:
        blocks: from (B, L, C) to (B, L, C).
    """

    blocks: nnx.List

    def streams(self, x: jax.Array, key: jax.Array | None, ends: Sequence[int], **given: Any) -> Iterator[jax.Array]:
        """Yield the residual stream (B, L, C) after each number of blocks in ``ends``, which rise.

        Args:
            x: what enters the first block.
            key: draws drop path in training mode.
            ends: numbers of blocks.
            **given: for every block, as :func:`run_blocks` hands it on.
        """
        training, remat = not self.deterministic, self.config.remat
        for start, end in itertools.pairwise((0, *ends)):
            x = run_blocks(self.blocks[start:end], x, key, training=training, remat=remat, first=start, **given)
            yield x

    @property
    def quarters(self) -> list[int]:
        """The numbers of blocks after which :meth:`features` takes its four maps."""
        return [-(-len(self.blocks) * quarter // 4) for quarter in (1, 2, 3, 4)]


def check_images(images: jax.Array, channels: int, smallest: int) -> None:
    """Raise a UserError unless ``images`` is (B, H, W, channels) with both sides at least ``smallest``."""
    shape = images.shape
    if len(shape) != 4 or shape[3] != channels or not jnp.issubdtype(images.dtype, jnp.floating):
        wanted = f"(batch, height, width, {channels}) normalised floats, as evmamba_jax.preprocess makes them"
        raise UserError(f"images must be {wanted}; got {images.dtype} of shape {shape}")
    if min(shape[1:3]) < smallest:
        raise UserError(f"image size {shape[1]}x{shape[2]} is too small: height and width must be at least {smallest}")
