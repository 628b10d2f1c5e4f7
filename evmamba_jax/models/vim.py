"""Vim (Vision Mamba): a plain sequence of patches, scanned forwards and backwards in every block.

Source: Zhu et al., Vision Mamba (arXiv:2401.09417); hustvl/Vim ``vim/models_mamba.py`` and
``mamba-1p1p1/mamba_ssm/modules/mamba_simple.py`` (bimamba v2) at dd0358a. Faults of that code that shape the released
weights are kept by default: the sum of the two directions is halved (``divide_out``), only the forward direction starts
with Mamba's time steps (``mamba_dt_init_backward``), and resizing the position embedding takes its first entry for the
class token's, which sits in the middle (``pos_embed_class_token``).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.typing import ArrayLike

from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.backbone import PlainBackbone, PlainConfig, check_images
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.channels import Group, Member, conv_members, scan_members
from evmamba_jax.layers.drop_path import drop_path_rates
from evmamba_jax.layers.inverted_residual import InvertedResidual
from evmamba_jax.layers.norm import RMSNorm
from evmamba_jax.layers.projections import Linear, depthwise_conv, pointwise_conv
from evmamba_jax.layers.resize import resize
from evmamba_jax.layers.s6 import S6, default_dt_rank
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.models.registry import ModelCard, register
from evmamba_jax.ranges import ranged
from pallas_kernels import Order

# Where the class token stands in a position embedding of M + 1 entries.
CLASS_TOKEN_AT = {"first": lambda patches: 0, "middle": lambda patches: patches // 2}

Place = Literal["first", "middle"]
Local = Literal["causal", "separable", "inverted_residual"]


class Grid(NamedTuple):
    """Where the tokens of a sequence stand: patches row by row, and a class token before patch ``class_at``, if any."""

    rows: int
    columns: int
    class_at: int | None


def on_grid(layer: Callable[[jax.Array], jax.Array], tokens: jax.Array, grid: Grid) -> jax.Array:
    """Apply a layer from (B, rows, columns, C) to the same shape to the patches of (B, L, C); the class token stays."""
    batch, _, channels = tokens.shape
    rows, columns, class_at = grid
    if class_at is None:
        return layer(tokens.reshape(batch, rows, columns, channels)).reshape(tokens.shape)
    patches, one = _take_out(tokens, class_at)
    return _insert(on_grid(layer, patches, grid._replace(class_at=None)), one, class_at)


class Direction(nnx.Module):
    """One direction of the mixer: depthwise convolution over the tokens passed so far, SiLU, selective scan.

    The convolution of ``local`` other than "causal" looks at the neighbours on the grid, the same in either direction.

    Args:
        width: channels C of the block, which the rank of the time step depends on.
        inner: channels E of the sequence.
        reverse: go from the last token to the first.
        d_state: state size N of every channel.
        d_conv: kernel of the causal convolution.
        local: what mixes neighbours: "causal", "separable" or "inverted_residual"; see :class:`VimConfig`.
        local_ratio: channels within an inverted residual over E.
        scan_init: initial values of the scan.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        dtype: compute type.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        reverse: bool,
        d_state: int,
        d_conv: int,
        local: Local = "causal",
        local_ratio: int = 6,
        scan_init: init.ScanInit,
        implementation: str | None,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        layer = {"dtype": dtype, "rngs": rngs}
        if local == "causal":
            before = [(0, d_conv - 1) if reverse else (d_conv - 1, 0)]
            self.conv = depthwise_conv(inner, (d_conv,), padding=before, backwards=reverse, **layer)
        elif local == "separable":
            self.conv = depthwise_conv(inner, **layer)
        else:
            self.conv = InvertedResidual(inner, expansion=local_ratio, act=jax.nn.relu6, **layer)
        self.of_grid = local != "causal"
        scan = {"d_state": d_state, "dt_rank": default_dt_rank(width), "implementation": implementation}
        self.scan = S6(inner, init=scan_init, **scan, rngs=rngs)
        self.orders = (Order(reverse=reverse),)

    def __call__(self, x: jax.Array, grid: Grid | None = None) -> jax.Array:
        """Map sequences (B, L, E) to (B, L, E), whose tokens stand on ``grid`` where ``local`` is not "causal"."""
        if self.of_grid:
            assert grid is not None
            x = on_grid(self.conv, x, grid)
        else:
            x = self.conv(x)
        x = nnx.silu(x)
        return self.scan(x[:, None], self.orders)[:, 0]  # a sequence is an image of height 1


class VimMixer(nnx.Module):
    """The paper's bidirectional mixer: two directions with parameters of their own between shared projections.

    Args:
        width: channels C.
        d_state: state size N of the scans.
        d_conv: kernel of the causal convolutions.
        local: what mixes neighbours before each scan; see :class:`VimConfig`.
        local_ratio: channels within an inverted residual over E.
        squeeze_excite: C over the channels of a gate on the output, from its mean over all tokens, the class token's
            too; None for no gate.
        expand: inner width E = expand * C.
        divide_out: halve the sum of the two directions.
        mamba_dt_init_backward: give the backward direction Mamba's initial time steps too, 0.001 to 0.1; otherwise its
            bias starts at zero, and its time steps near softplus(0) = 0.69.
        depth: blocks of the model; the initial output projection is divided by its root.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        dtype: compute type; the recurrence is float32 or wider whatever it says.
        rngs: source of the initial values.

    Source: Vim section 3.3, algorithm 1; ``Mamba`` with bimamba_type "v2".
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        local: Local = "causal",
        local_ratio: int = 6,
        squeeze_excite: int | None = None,
        expand: int = 2,
        divide_out: bool = True,
        mamba_dt_init_backward: bool = False,
        depth: int = 1,
        implementation: str | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        inner = expand * width

        options = {"d_state": d_state, "d_conv": d_conv, "local": local, "local_ratio": local_ratio}
        options |= {"implementation": implementation, "dtype": dtype}
        direction = functools.partial(Direction, width, inner, **options, rngs=rngs)
        mamba = init.ScanInit()
        backward_init = mamba if mamba_dt_init_backward else mamba._replace(dt_bias=init.zeros)
        out_init = init.within((inner * depth) ** -0.5)
        self.in_proj = Linear(width, 2 * inner, use_bias=False, kernel_init=init.torch_default, dtype=dtype, rngs=rngs)
        self.forward = direction(reverse=False, scan_init=mamba)
        self.backward = direction(reverse=True, scan_init=backward_init)
        self.out_proj = Linear(inner, width, use_bias=False, kernel_init=out_init, dtype=dtype, rngs=rngs)
        self.divide_out = divide_out
        gate = {"layer": pointwise_conv, "use_bias": False, "dtype": dtype, "rngs": rngs}
        self.se = None if squeeze_excite is None else SqueezeExcite(width, squeeze_excite, **gate)

    def __call__(self, x: jax.Array, *, grid: Grid | None = None) -> jax.Array:
        """Map sequences (B, L, C) to (B, L, C), whose tokens stand on ``grid`` where ``local`` is not "causal"."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        y = (self.forward(x, grid) + self.backward(x, grid)) * nnx.silu(z)
        y = self.out_proj(y / 2 if self.divide_out else y)
        return y if self.se is None else self.se(y)

    def channel_groups(self) -> list[Group]:
        """Return the channels of the scans, tied over both directions."""
        inner = self.out_proj.kernel.shape[0]
        members = [Member("in_proj.kernel", 1, half * inner, weight=True) for half in range(2)]
        for name, direction in (("forward", self.forward), ("backward", self.backward)):
            local = direction.conv
            if isinstance(local, InvertedResidual):
                members += local.outer_members(f"{name}.conv")
            else:
                members += conv_members(f"{name}.conv", local)
            members += scan_members(f"{name}.scan")
        return [Group("", inner, (*members, Member("out_proj.kernel", 0, weight=True)))]


_PRETRAINED_GRID = 14  # patches of a side, to which positions of rotary embeddings are scaled


def rotary_angles(grid: Grid, channels: int, dtype: Dtype) -> jax.Array:
    """Return the angles (rows, columns, C / 2) by which a rotary embedding turns pairs of channels.

    Those of the first half of the pairs grow with the row, those of the second with the column, each at another rate.

    Source: hustvl/Vim ``vim/rope.py`` at dd0358a, ``VisionRotaryEmbeddingFast``.
    """
    rates = 10000.0 ** -(jnp.arange(0, channels // 2, 2, dtype=dtype) / (channels // 2))
    along = lambda count: jnp.arange(count, dtype=dtype)[:, None] / count * _PRETRAINED_GRID * rates  # noqa: E731
    shape = (grid.rows, grid.columns, len(rates))
    down, right = along(grid.rows)[:, None], along(grid.columns)[None]
    return jnp.concatenate([jnp.broadcast_to(angles, shape) for angles in (down, right)], -1)


class RotaryBlock(Block):
    """A block that turns the sequence before all else, so that its channels tell where a token stands."""

    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, grid: Grid, **given: Any) -> jax.Array:
        """Map (B, L, C) to (B, L, C); arguments as for Block."""
        angles = rotary_angles(grid, x.shape[-1], x.dtype).reshape(x.shape[1], -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return super().__call__(turned.reshape(x.shape), key, grid=grid, **given)


def _insert(tokens: jax.Array, one: jax.Array, at: int) -> jax.Array:
    return jnp.concatenate([tokens[:, :at], one, tokens[:, at:]], 1)


def _take_out(tokens: jax.Array, at: int) -> tuple[jax.Array, jax.Array]:
    """Return (B, L, C) without its token ``at``, and that token (B, 1, C)."""
    return jnp.concatenate([tokens[:, :at], tokens[:, at + 1 :]], 1), tokens[:, at : at + 1]


def resize_pos_embed(
    pos_embed: ArrayLike,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    class_token: Place | None = "first",
) -> jax.Array:
    """Resize a position embedding bicubically from one grid of patches to another; the class token's entry stays.

    For weights that go on at another size or stride, e.g. from ``vim_t`` (14x14 patches) to ``vim_t_stride8`` (27x27).

    Args:
        pos_embed: (1, M + 1, C) for M = rows * columns patches row by row and the class token; (1, M, C) without.
        old_grid: (rows, columns) of the patches it is for.
        new_grid: those it shall be for.
        class_token: which entry is the class token's: "first", as the official code has it, which so moves the patches
            of the first half by one; "middle", where it is in truth; None for a position embedding without.

    Returns:
        (1, new M + 1, C), or (1, new M, C); the same values when the grids are equal.

    Raises:
        UserError: an unknown ``class_token``; a position embedding that does not fit the old grid.

    Source: hustvl/Vim ``vim/main.py`` (finetune), ``vim/utils.py`` ``interpolate_pos_embed``.
    """
    pos_embed = jnp.asarray(pos_embed)
    place = None if class_token is None else one_of("class_token", class_token, CLASS_TOKEN_AT)
    old, new = (rows * columns for rows, columns in (old_grid, new_grid))
    extra = 0 if place is None else 1
    if pos_embed.ndim != 3 or pos_embed.shape[:2] != (1, old + extra):
        raise UserError(
            f"pos_embed has shape {pos_embed.shape}; (1, {old + extra}, channels) are allowed for a grid of "
            f"{old_grid[0]}x{old_grid[1]} patches and class_token={class_token!r}"
        )

    def resized(patches: jax.Array) -> jax.Array:
        return resize(patches.reshape(1, *old_grid, -1), *new_grid, "bicubic").reshape(1, new, -1)

    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    if place is None:
        return resized(pos_embed)
    patches, own = _take_out(pos_embed, place(old))
    return _insert(resized(patches), own, place(new))


@dataclasses.dataclass(frozen=True)
class VimConfig(PlainConfig):
    """Options of Vim; :class:`PlainConfig` and every family have the others.

    The position embedding has the grid of patches of ``image_size``.

    Attributes:
        stride: pixels between patches; they overlap where it is smaller than a patch.
        d_state: state size N of the scans.
        d_conv: kernel of the causal convolutions.
        expand: inner width of the scans over C.
        divide_out: halve the sum of the two directions.
        mamba_dt_init_backward: start the backward direction with Mamba's time steps too.
        pos_embed_class_token: the entry that a resize of the position embedding takes for the class token's: "first",
            as the official code has it, or "middle", where it is; see :func:`resize_pos_embed`.
        class_token: False leaves it out, as the official backbones for detection and segmentation do; the mean over
            the patches then enters the head.
        rope: turn the sequence by a rotary embedding before every block, as the official detector does; without class
            token alone.
        local: what mixes neighbours before each scan. "causal", the published model: a convolution over the ``d_conv``
            tokens passed last. The others see the 3x3 neighbours on the grid of patches, and the class token passes
            them by: "separable", a depthwise convolution; "inverted_residual", MobileNetV2's block of one.
        local_ratio: channels within that block over those of the scan.

    Raises:
        UserError: no blocks, an image_size below one patch, an unknown pos_embed_class_token or local, a squeeze_excite
            above the width, a rope with a class token or a width that is no multiple of 4.
    """

    stride: int = ranged(16, least=1)
    d_state: int = ranged(16, least=1)
    d_conv: int = ranged(4, least=1)
    expand: int = ranged(2, least=1)
    divide_out: bool = True
    mamba_dt_init_backward: bool = False
    pos_embed_class_token: Place = "first"
    class_token: bool = True
    rope: bool = False
    local: Local = "causal"
    local_ratio: int = ranged(6, least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.rope and (self.class_token or self.width % 4):
            raise UserError(
                f"rope=True with class_token={self.class_token} and width={self.width} is not allowed: "
                "it needs class_token=False, and a width that is a multiple of 4"
            )

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of this size."""
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1


class Vim(PlainBackbone):
    """Vim: patches and a class token among them, a position embedding, ``depth`` blocks, the class token to the head.

    Images of any size from one patch up; where their grid of patches is not the one of ``image_size``, the position
    embedding is resized bicubically at run time. The official code takes images of ``image_size`` only.
    """

    def __init__(self, config: VimConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        layer = {"dtype": config.dtype, "rngs": rngs}
        width = config.width
        # timm 0.4's lecun_normal_ divides by the deviation of a normal cut at 2 deviations, but does not cut it there.
        fan_in = config.in_channels * config.patch_size**2
        self.patch_embed = nnx.Conv(
            config.in_channels,
            width,
            (config.patch_size, config.patch_size),
            strides=config.stride,
            padding=0,
            kernel_init=init.normal(fan_in**-0.5 / 0.87962566103423978),
            bias_init=init.zeros,
            **layer,
        )

        def embedding(tokens: int) -> nnx.Param:
            return nnx.Param(init.linear_normal(rngs.params(), (1, tokens, width), jnp.float32))

        self.cls_token = embedding(1) if config.class_token else None
        self.pos_embed = embedding(math.prod(config.grid) + config.class_token)

        options = config.pick(
            *("d_state", "d_conv", "local", "local_ratio", "squeeze_excite", "expand"),
            *("divide_out", "mamba_dt_init_backward", "implementation"),
        )

        def block(drop_path: float) -> Block:
            # No dtype: the norm of the residual stream keeps its width; the mixer's projection narrows it.
            mixer = VimMixer(width, depth=config.depth, **options, **layer)
            kind = RotaryBlock if config.rope else Block
            return kind(width, mixer, None, drop_path=drop_path, norm=RMSNorm, dtype=None, rngs=rngs)

        (rates,) = drop_path_rates(config.drop_path_rate, [config.depth])
        self.blocks = nnx.List([block(rate) for rate in rates])
        self.norm = RMSNorm(width, rngs=rngs)
        self.head = Linear(width, config.num_classes, **layer) if config.num_classes else None

    def tokens(self, images: jax.Array) -> jax.Array:
        """Return what enters the first block: (B, M + 1, C), the class token at M // 2 of M patches row by row.

        Raises:
            UserError: images of another rank, another number of channels, or smaller than a patch.
        """
        check_images(images, self.in_channels, self.config.patch_size)
        grid = self.config.grid_of(*images.shape[1:3])
        x = self.patch_embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.cls_token is not None:
            one = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1]))
            x = _insert(x, one, x.shape[1] // 2)
        # Adding a float32 parameter makes the residual stream float32 whatever the compute type.
        return x + resize_pos_embed(
            self.pos_embed[...],
            self.config.grid,
            grid,
            class_token=self.config.pos_embed_class_token if self.cls_token is not None else None,
        )

    def _grid(self, images: jax.Array) -> Grid:
        """Return where the tokens of images stand."""
        rows, columns = self.config.grid_of(*images.shape[1:3])
        return Grid(rows, columns, None if self.cls_token is None else rows * columns // 2)

    def _streams(self, images: jax.Array, key: jax.Array | None, ends: Sequence[int]) -> Iterator[jax.Array]:
        return self.streams(self.tokens(images), key, ends, grid=self._grid(images))

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """Return the residual stream after each quarter of the blocks as maps [(B, h, w, C), ...], without class token.

        All four are of one size, and float32 or wider. With ``class_token=False`` they are the maps of the official
        backbone for segmentation (use_residual_as_feature, last_layer_process "add") without rotary embedding; with
        ``rope=True`` the last is the one of the official backbone for detection.

        Args:
            images: (B, H, W, in_channels) normalised floats, H and W at least ``patch_size``.
            key: random key for drop path; needed in training mode when ``drop_path_rate`` is not zero.

        Raises:
            UserError: images of another rank, another number of channels, or smaller than a patch.
        """
        maps = []
        for x in self._streams(images, key, self.quarters):
            rows, columns, class_at = self._grid(images)
            x = x if class_at is None else _take_out(x, class_at)[0]
            maps.append(x.reshape(x.shape[0], rows, columns, -1))
        return maps

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits (B, num_classes); arguments and errors as for :meth:`features`."""
        (x,) = self._streams(images, key, [len(self.blocks)])
        x = self.norm(x).mean(1) if self.cls_token is None else self.norm(x[:, (x.shape[1] - 1) // 2])
        return x if self.head is None else self.head(x)


_card = functools.partial(
    ModelCard,
    paper="2401.09417",
    licence="Apache-2.0",
    licence_note="as the Hugging Face pages say; LICENSE.txt of the repository is the same",
)
_HUB = "https://huggingface.co/hustvl/Vim-"
_OLD_COUNT = (
    "The published FLOPs are those that {} prints; they count the scan by an older, 2.5 times smaller convention."
)
_FINE_TUNED = "Fine-tuned from the model of stride 16 for 30 epochs."

# B has no published recipe, but weights; the stride-8 models are T and S fine-tuned with overlapping patches.
# fmt: off
register("vim_t", Vim, VimConfig(),
         _card(7_148_008, 1_819_227_648, 1.5e9, 76.1, 93.0, _HUB + "tiny-midclstok", "vim_t_midclstok_76p1acc.pth",
               note=_OLD_COUNT.format("EfficientVMamba's paper")))
register("vim_s", Vim, VimConfig(width=384),
         _card(25_796_584, 5_904_264_192, 5.3e9, 80.5, 95.1, _HUB + "small-midclstok", "vim_s_midclstok_80p5acc.pth",
               note=_OLD_COUNT.format("VMamba's paper") + " Vim's paper has top-1 80.3; these weights have 80.5."))
register("vim_b", Vim, VimConfig(width=768),
         _card(97_598_440, 20_871_763_968, None, 81.9, 95.8, _HUB + "base-midclstok", None))
register("vim_t_stride8", Vim, VimConfig(stride=8),
         _card(7_250_344, 6_741_179_904, None, 78.3, 94.2, _HUB + "tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth",
               note=_FINE_TUNED))
register("vim_s_stride8", Vim, VimConfig(width=384, stride=8),
         _card(26_001_256, 21_878_504_448, None, 81.6, 95.4, _HUB + "small-midclstok", "vim_s_midclstok_ft_81p6acc.pth",
               note=f"{_FINE_TUNED} Vim's paper has top-1 81.4; these weights have 81.6."))
# fmt: on
