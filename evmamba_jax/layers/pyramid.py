"""What the families of four stages share: the walk from stem to head, and what it asks of the images."""

from collections.abc import Callable, Iterator, Sequence

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.layers.blocks import run_blocks
from evmamba_jax.layers.drop_path import drop_path_rates, fold_in
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.patches import Stem
from evmamba_jax.layers.projections import Linear


class Stage(nnx.Module):
    """Blocks of one resolution, and the downsampling to the next (the last stage has none)."""

    def __init__(self, blocks: Sequence[nnx.Module], downsample: nnx.Module | None, *, remat: str = "none"):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample
        self.remat = remat
        self.deterministic = True

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) through the blocks to (B, H, W, C); ``key`` draws the drop path in training mode."""
        return run_blocks(self.blocks, x, key, training=not self.deterministic, remat=self.remat)


def stage_parts(
    width: int,
    depths: Sequence[int],
    drop_path_rate: float,
    block: Callable[[int, int, int, float], nnx.Module],
    downsample: Callable[[int], nnx.Module],
) -> Iterator[tuple[list[nnx.Module], nnx.Module | None]]:
    """Yield the arguments of four :class:`Stage`: blocks, and the downsampling that the last stage does not have.

    Args:
        width: channels C of the first stage; every stage doubles them.
        depths: blocks of each stage.
        drop_path_rate: of the last block; it rises linearly from 0 over all blocks.
        block: makes a block from the number of its stage, its own number in it, C of the stage and its drop path.
        downsample: makes the downsampling of a stage of C channels.

    Raises:
        UserError: depths that are not four.
    """
    if len(depths) != 4 or min(depths) < 0:
        raise UserError(f"depths must name the blocks of four stages, e.g. (2, 2, 4, 2); got {tuple(depths)}")
    for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
        c = width * 2**i
        blocks = [block(i, j, c, rate) for j, rate in enumerate(rates)]
        yield blocks, downsample(c) if i < 3 else None


class Pyramid(nnx.Module):
    """Stem, four stages, a norm at every pixel, the mean over pixels, a linear head.

    Beside the arguments below, its families take ``drop_path_rate``: the stochastic depth of the last block; it rises
    linearly from 0 over all blocks.

    Args:
        patch_embed: the stem, from images of at least its ``smallest`` side to (B, h, w, C) of the first stage.
        stages: the stages; each doubles the channels.
        width: channels C of the first stage.
        norm: the last norm.
        num_classes: outputs of the head; 0 leaves it out, and the model returns the pooled features.
        out_norms: build the official backbone for detection and segmentation: ``features()`` passes each map through
            a LayerNorm of its own, and the last norm and the head are left out.
        in_channels: channels of the images.
        dtype: compute type, e.g. ``jnp.bfloat16``; None takes the promoted type of images and parameters. Parameters,
            time steps, decays, the recurrence, softmax and all statistics stay float32 or wider.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        patch_embed: Stem,
        stages: Sequence[Stage],
        width: int,
        *,
        norm: Callable[..., nnx.Module] = LayerNorm,
        num_classes: int,
        out_norms: bool,
        in_channels: int,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        widths = [width * 2**i for i in range(len(stages))]
        self.patch_embed = patch_embed
        self.stages = nnx.List(stages)
        if out_norms:
            self.out_norms = nnx.List([LayerNorm(c, dtype=dtype, rngs=rngs) for c in widths])
            self.norm = self.head = None
        else:
            self.out_norms = None
            self.norm = norm(widths[-1], dtype=dtype, rngs=rngs)
            self.head = Linear(widths[-1], num_classes, dtype=dtype, rngs=rngs) if num_classes else None
        self.in_channels = in_channels

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """Return the four stage maps [(B, h, w, C), ...], each before its downsampling.

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
        x = self.norm(self.features(images, key=key)[-1]).mean((1, 2))
        return x if self.head is None else self.head(x)


def check_images(images: jax.Array, channels: int, smallest: int) -> None:
    """Raise a UserError unless ``images`` is (B, H, W, channels) with both sides at least ``smallest``."""
    shape = images.shape
    if len(shape) != 4 or shape[3] != channels:
        raise UserError(f"images must be (batch, height, width, {channels}) floats; got shape {shape}")
    if min(shape[1:3]) < smallest:
        raise UserError(f"image size {shape[1]}x{shape[2]} is too small: height and width must be at least {smallest}")
