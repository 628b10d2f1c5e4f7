"""MambaVision: convolutions at high resolution, then windows of tokens through Mamba mixers and, last, attention.

Source: Hatamizadeh and Kautz, MambaVision (arXiv:2407.08083); NVlabs/MambaVision
``mambavision/models/mamba_vision.py`` at 7860a50. Two faults of that code shape the released weights and are kept by
default: the bias of the time step enters twice (``double_dt_bias``), and the last initialisation pass overwrites the
initial time steps of Mamba (``mamba_dt_init``).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.attention import Attention
from evmamba_jax.layers.attention_pool import AttentionPool
from evmamba_jax.layers.backbone import Stage, StagedBackbone, StagedConfig
from evmamba_jax.layers.block import Block, scaled
from evmamba_jax.layers.channels import Group, Member, conv_members, scan_members
from evmamba_jax.layers.drop_path import DropPath
from evmamba_jax.layers.mlp import Mlp
from evmamba_jax.layers.norm import BatchNorm, LayerNorm
from evmamba_jax.layers.patches import AttentionDownsample, NormDownsample, PatchEmbed, Stem
from evmamba_jax.layers.projections import Linear, conv, depthwise_conv
from evmamba_jax.layers.s4d import S4D
from evmamba_jax.layers.s5 import S5
from evmamba_jax.layers.s6 import S6, default_dt_rank
from evmamba_jax.layers.sliding_window import Edges, SlidingWindowAttention
from evmamba_jax.models.registry import ModelCard, register
from evmamba_jax.ranges import ranged
from pallas_kernels import Order

SSM = Literal["s6", "s4d", "s5"]


class ConvStem(Stem):
    """Two 3x3 convolutions of stride 2, each with a norm and ReLU (the official ``PatchEmbed``, with BatchNorm)."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        width: int,
        *,
        norm: Callable[..., Any] = functools.partial(BatchNorm, epsilon=1e-4),  # noqa: B008 - immutable
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        self.smallest = 1
        self.conv1 = conv(in_channels, hidden, 3, stride=2, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = norm(hidden, dtype=dtype, rngs=rngs)
        self.conv2 = conv(hidden, width, 3, stride=2, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = norm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (B, H, W, in_channels) to (B, ceil(H/4), ceil(W/4), width)."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)))


class ConvBlock(nnx.Module):
    """The residual block of the first two stages: two 3x3 convolutions with BatchNorm, GELU (tanh form) between."""

    def __init__(self, width: int, *, drop_path: float, dtype: Dtype | None, rngs: nnx.Rngs):
        self.conv1 = conv(width, width, 3, padding=1, dtype=dtype, rngs=rngs)
        self.norm1 = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.conv2 = conv(width, width, 3, padding=1, dtype=dtype, rngs=rngs)
        self.norm2 = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C); ``key`` draws the drop path in training mode."""
        y = nnx.gelu(self.norm1(self.conv1(x)), approximate=True)
        return x + self.drop_path(self.norm2(self.conv2(y)), key)


class ConvNeXtBlock(nnx.Module):
    """The block of ConvNeXt: depthwise 7x7 convolution, LayerNorm, an MLP of 4C channels, layer scale from 1e-6.

    Source: Liu et al., A ConvNet for the 2020s (arXiv:2201.03545), section 2.6.
    """

    def __init__(self, width: int, *, drop_path: float, dtype: Dtype | None, rngs: nnx.Rngs):
        self.conv = depthwise_conv(width, (7, 7), dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, dtype=dtype, rngs=rngs)
        self.gamma = nnx.Param(init.full(width, 1e-6))
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C); ``key`` draws the drop path in training mode."""
        return x + self.drop_path(scaled(self.mlp(self.norm(self.conv(x))), self.gamma), key)


CONV_BLOCKS = {"mambavision": ConvBlock, "convnext": ConvNeXtBlock}


class MambaVisionMixer(nnx.Module):
    """The paper's mixer: half of the channels through convolution and scan, half through convolution alone, side by
    side.

    Args:
        width: channels C; each half has C / 2.
        ssm: what runs along the sequence: "s6", the selective scan, or a system that does not depend on the tokens,
            "s4d" or "s5".
        bidirectional: it also runs from the last token to the first, with parameters of its own; the results add up.
        d_state: its state size: N for each channel, with "s5" P for all of them.
        d_conv: kernel of the two depthwise convolutions, which look both ways.
        double_dt_bias: of "s6", as the next two: add the bias of the time step twice.
        mamba_dt_init: initial time steps of Mamba, log-uniform between 0.001 and 0.1, however often the bias enters;
            otherwise the bias starts at zero, and the time steps near softplus(0) = 0.69.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        dtype: compute type; the recurrence is float32 or wider whatever it says.
        rngs: source of the initial values.

    Raises:
        UserError: an odd state size of "s4d" or "s5".

    Source: MambaVision section 3.2; ``MambaVisionMixer``.
    """

    def __init__(
        self,
        width: int,
        *,
        ssm: SSM = "s6",
        bidirectional: bool = False,
        d_state: int = 8,
        d_conv: int = 3,
        double_dt_bias: bool = True,
        mamba_dt_init: bool = False,
        implementation: str | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        half = width // 2
        times = 2.0 if double_dt_bias else 1.0
        if mamba_dt_init:
            scan_init = init.ScanInit(
                x_proj=init.linear_normal,
                dt_bias=lambda key, shape, dtype=jnp.float32: init.dt_bias(key, shape, dtype) / times,
            )
        else:
            scan_init = init.ScanInit(x_proj=init.linear_normal, dt_proj=init.linear_normal, dt_bias=init.zeros)

        def convolution() -> nnx.Conv:
            same = [((d_conv - 1) // 2, d_conv // 2)]
            return depthwise_conv(half, (d_conv,), padding=same, use_bias=False, dtype=dtype, rngs=rngs)

        self.in_proj = Linear(width, 2 * half, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv_x = convolution()
        self.conv_z = convolution()
        self.orders = (Order(), Order(reverse=True))[: 1 + bidirectional]
        if ssm == "s6":
            self.scan = S6(
                half,
                len(self.orders),
                d_state=d_state,
                dt_rank=default_dt_rank(width),
                init=scan_init,
                dt_bias_factor=times,
                implementation=implementation,
                rngs=rngs,
            )
        else:
            system = {"s4d": S4D, "s5": S5}[ssm]
            self.scan = system(half, d_state=d_state, bidirectional=bidirectional, rngs=rngs)
        self.out_proj = Linear(2 * half, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map sequences (B, L, C) to (B, L, C)."""
        x, z = jnp.split(self.in_proj(x), [self.conv_x.kernel.shape[-1]], axis=-1)
        x, z = nnx.silu(self.conv_x(x)), nnx.silu(self.conv_z(z))
        # To the selective scan a sequence is an image of height 1.
        y = self.scan(x[:, None], self.orders)[:, 0] if isinstance(self.scan, S6) else self.scan(x)
        return self.out_proj(jnp.concatenate([y, z], -1))

    def channel_groups(self) -> list[Group]:
        """Return the channels of the scan, "x", where it is S6, and those of the branch beside it, "z"."""
        scanned, beside = self.conv_x.kernel.shape[-1], self.conv_z.kernel.shape[-1]

        def group(name: str, size: int, offset: int, *more: Member) -> Group:
            conv = conv_members(f"conv_{name}", getattr(self, f"conv_{name}"))
            ends = Member("in_proj.kernel", 1, offset, weight=True), Member("out_proj.kernel", 0, offset, weight=True)
            return Group(name, size, (*ends, *conv, *more))

        groups = [group("x", scanned, 0, *scan_members("scan"))] if isinstance(self.scan, S6) else []
        return [*groups, group("z", beside, scanned)]


def to_windows(x: jax.Array, size: int) -> jax.Array:
    """Cut a map (B, H, W, C) into windows (B * rows * columns, size * size, C), each row by row.

    The map is first padded with zeros below and right to a multiple of ``size``.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
    return rearrange(x, "b (r h) (s w) c -> (b r s) (h w) c", h=size, w=size)


def from_windows(windows: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """Put windows of :func:`to_windows` together to the map (B, height, width, C), without its padding."""
    rows, columns = -(-height // size), -(-width // size)
    x = rearrange(windows, "(b r s) (h w) c -> b (r h) (s w) c", r=rows, s=columns, h=size)
    return x[:, :height, :width]


class WindowStage(Stage):
    """A stage whose blocks see every window of the map as a sequence of its own; they draw drop path for each.

    Zeros that fill the last windows are tokens like any other within the stage, and are cut off at its end.

    Args:
        blocks: modules from sequences (B, L, C) to sequences.
        downsample: to the next stage; None for the last.
        window: side of the windows, pixels.
        whole: the last so many blocks see the map (B, H, W, C) instead, without padding, and draw drop path for each
            image.
        remat: as for :class:`Stage`.
    """

    def __init__(
        self,
        blocks: Sequence[nnx.Module],
        downsample: nnx.Module | None,
        window: int,
        *,
        whole: int = 0,
        remat: str = "none",
    ):
        super().__init__(blocks, downsample, remat=remat)
        self.window = window
        self.in_windows = len(blocks) - whole

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) through the blocks to (B, H, W, C); ``key`` draws the drop path in training mode."""
        height, width = x.shape[1:3]
        x = self.run(to_windows(x, self.window), key, end=self.in_windows)
        x = from_windows(x, self.window, height, width)
        return self.run(x, key, first=self.in_windows)


@dataclasses.dataclass(frozen=True)
class MambaVisionConfig(StagedConfig):
    """Options of MambaVision; every family of four stages has the others.

    Those from ``attention_radius`` on are variations without released weights, except that ``attention_radius`` and
    ``attention_edges`` leave the parameters of a published model as they are.

    Attributes:
        stem_width: channels between the two convolutions of the stem.
        num_heads: attention heads of each stage; the first two stages use none.
        window_size: side of the windows of each stage, pixels of its map; the first two stages use none.
        mlp_ratio: hidden width of the MLP over C.
        layer_scale: initial value of a learned factor for each channel of each branch, in the last two stages; None
            for no factor.
        d_state: state size N of the scans; with ``ssm="s5"`` P.
        d_conv: kernel of the mixers' convolutions.
        double_dt_bias: add the bias of the time step twice, as the released weights want it.
        mamba_dt_init: start from Mamba's time steps, 0.001 to 0.1, which the official code overwrites.
        attention_radius: attention blocks see, in place of windows, the whole map without padding, each pixel those at
            most so many rows and columns away. None for windows. The mixers keep theirs.
        attention_edges: what a pixel near the border then sees: "clip", the part of its square that lies on the map, or
            "shift", a whole square moved inwards.
        ssm: in the mixers, in place of the selective scan "s6", which has weights for each token, a system that is the
            same for all: "s4d", one for each channel, or "s5", one for all channels; ``d_state`` is even then.
        ssm_bidirectional: scan from the last token to the first too, and add.
        downsample: between stages: "conv", 3x3 of stride 2; "attention", a mean of 2x2 pixels weighted by a learned
            score, and a projection; "convnext", LayerNorm and 2x2 of stride 2.
        pool: before the head: "mean", or "attention" of a learned query, with the heads of the last stage.
        conv_block: of the first two stages: "mambavision", or "convnext" with a depthwise 7x7 convolution.
        stem: "conv", two 3x3 of stride 2, or "patchify", 4x4 of stride 4 and LayerNorm, which takes images from four
            pixels up.
        stem_norm: of the stem "conv": "batch" or "layer".

    Raises:
        UserError: depths, heads or windows that are not four positive numbers; heads that do not divide their width; an
            odd ``d_state`` with "s4d" or "s5".
    """

    width: int = 80
    stem_width: int = ranged(32, least=1)
    depths: Sequence[int] = (1, 3, 8, 4)
    num_heads: Sequence[int] = ranged((2, 4, 8, 16), least=1)
    window_size: Sequence[int] = ranged((8, 8, 14, 7), least=1)
    mlp_ratio: float = ranged(4.0, above=0)
    layer_scale: float | None = ranged(None, above=0)
    d_state: int = ranged(8, least=1)
    d_conv: int = ranged(3, least=1)
    double_dt_bias: bool = True
    mamba_dt_init: bool = False
    attention_radius: int | None = ranged(None, least=0)
    attention_edges: Edges = "clip"
    ssm: SSM = "s6"
    ssm_bidirectional: bool = False
    downsample: Literal["conv", "attention", "convnext"] = "conv"
    pool: Literal["mean", "attention"] = "mean"
    conv_block: Literal["mambavision", "convnext"] = "mambavision"
    stem: Literal["conv", "patchify"] = "conv"
    stem_norm: Literal["batch", "layer"] = "batch"

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_heads", "window_size"):
            numbers = getattr(self, name)
            if len(numbers) != 4:
                raise UserError(f"{name} must give one positive number for each of four stages; got {numbers}")


class MambaVision(StagedBackbone):
    """MambaVision: convolutional blocks in the first two stages, mixers and then attention in the last two.

    Images of any size from one pixel up, rectangles included. A map that does not divide into windows, or is smaller
    than one, is padded with zeros below and right; the padding takes part in scans and attention, as it does in the
    official code. The published windows divide images of 224 (14 and 7), of 256 (16 and 8) or 512 pixels (32 and 16)
    without padding. The official detectors take windows (8, 8, 112, 56), the segmenters (8, 8, 64, 32) and, with S,
    (8, 8, 160, 56); no weight depends on them.
    """

    def __init__(self, config: MambaVisionConfig, *, rngs: nnx.Rngs):
        layer = {"dtype": config.dtype, "rngs": rngs}
        scan = config.pick("ssm", "d_state", "d_conv", "double_dt_bias", "mamba_dt_init", "implementation")

        def mixers(stage: int) -> int:
            return -(-config.depths[stage] // 2)  # of an odd number of blocks the middle one is a mixer

        def attention(c: int, heads: int) -> Attention:
            if config.attention_radius is None:
                return Attention(c, heads, **layer)
            reach = {"radius": config.attention_radius, "edges": config.attention_edges}
            return SlidingWindowAttention(c, heads, **reach, **layer)

        def block(stage: int, number: int, c: int, drop_path: float) -> nnx.Module:
            if stage < 2:
                return CONV_BLOCKS[config.conv_block](c, drop_path=drop_path, **layer)
            if number < mixers(stage):
                mixer = MambaVisionMixer(c, bidirectional=config.ssm_bidirectional, **scan, **layer)
            else:
                mixer = attention(c, config.num_heads[stage])
            mlp = Mlp(c, int(config.mlp_ratio * c), **layer)
            return Block(c, mixer, mlp, drop_path=drop_path, layer_scale=config.layer_scale, **layer)

        def downsample(c: int) -> nnx.Module:
            if config.downsample == "conv":
                return conv(c, 2 * c, 3, stride=2, padding=1, use_bias=False, **layer)
            return {"attention": AttentionDownsample, "convnext": NormDownsample}[config.downsample](c, **layer)

        def stage(i: int, blocks: Any, halve: Any, remat: str) -> Stage:
            if i < 2:
                return Stage(blocks, halve, remat=remat)
            whole = 0 if config.attention_radius is None else len(blocks) - mixers(i)
            return WindowStage(blocks, halve, config.window_size[i], whole=whole, remat=remat)

        def pool(c: int) -> AttentionPool:
            return AttentionPool(c, config.num_heads[-1], **layer)

        if config.stem == "patchify":
            stem = PatchEmbed(config.in_channels, config.width, **layer)
        else:
            norm = {"norm": LayerNorm} if config.stem_norm == "layer" else {}
            stem = ConvStem(config.in_channels, config.stem_width, config.width, **norm, **layer)
        parts = {"norm": BatchNorm, "stage": stage, "pool": pool if config.pool == "attention" else None}
        super().__init__(config, stem, block, downsample, **parts, rngs=rngs)


_card = functools.partial(
    ModelCard,
    paper="2407.08083",
    licence="CC-BY-NC-SA-4.0",
    licence_note="as the README says: not for commercial use; the Hugging Face pages name the code's licence, "
    "NVIDIA Source Code License-NC, which is not for commercial use either",
    crop=1.0,
)
_hub = "https://huggingface.co/nvidia/MambaVision-{}/resolve/main/".format
_21K = "Pre-trained on ImageNet-21K, fine-tuned on ImageNet-1K."
_AT_512 = f"{_21K} Neither FLOPs figure holds attention's products of queries, keys and values, {{}}e9 more."
_card_21k = functools.partial(_card, note=_21K)
_card_512 = functools.partial(_card, input_size=(512, 512), crop=0.93, crop_mode="squash")

_B = MambaVisionConfig(width=128, stem_width=64, depths=(3, 3, 10, 5), layer_scale=1e-5)
_L = dataclasses.replace(_B, width=196, num_heads=(4, 8, 16, 32))
_L2 = dataclasses.replace(_L, depths=(3, 3, 12, 5))
_L3 = dataclasses.replace(_L, width=256, depths=(3, 3, 20, 10))

# fmt: off
register("mambavision_t", MambaVision, MambaVisionConfig(),
         _card(31_794_248, 4_471_465_856, 4.4e9, 82.3, 96.2, _hub("T-1K"), "mambavision_tiny_1k.pth.tar"))
register("mambavision_t2", MambaVision, MambaVisionConfig(depths=(1, 3, 11, 4)),
         _card(35_104_008, 5_122_185_856, 5.1e9, 82.7, 96.3, _hub("T2-1K"), "mambavision_tiny2_1k.pth.tar", crop=0.98))
register("mambavision_s", MambaVision, MambaVisionConfig(width=96, stem_width=64, depths=(3, 3, 7, 5)),
         _card(50_140_584, 7_496_855_424, 7.5e9, 83.3, 96.5, _hub("S-1K"), "mambavision_small_1k.pth.tar", crop=0.93))
register("mambavision_b", MambaVision, _B,
         _card(97_685_288, 14_979_638_784, 15.0e9, 84.2, 96.9, _hub("B-1K"), "mambavision_base_1k.pth.tar"))
register("mambavision_b_21k", MambaVision, _B,
         _card_21k(97_685_288, 14_979_638_784, 15.0e9, 84.9, 97.5, _hub("B-21K"), "mambavision_base_21k.pth.tar"))
register("mambavision_l", MambaVision, _L,
         _card(227_961_048, 34_879_886_384, 34.9e9, 85.0, 97.1, _hub("L-1K"), "mambavision_large_1k.pth.tar"))
register("mambavision_l_21k", MambaVision, _L,
         _card_21k(227_961_048, 34_879_886_384, 34.9e9, 86.1, 97.9, _hub("L-21K"), "mambavision_large_21k.pth.tar"))
register("mambavision_l2", MambaVision, _L2,
         _card(241_554_824, 37_545_111_632, 37.5e9, 85.3, 97.2, _hub("L2-1K"), "mambavision_large2_1k.pth.tar"))
register("mambavision_l2_512", MambaVision, dataclasses.replace(_L2, window_size=(8, 8, 32, 16)),
         _card_512(241_554_824, 196_147_428_608, 196.3e9, 87.3, 98.4, _hub("L2-512-21K"),
               "mambavision_L2_21k_240m_512.pth.tar", note=_AT_512.format(10.3)))
register("mambavision_l3_256", MambaVision, dataclasses.replace(_L3, window_size=(8, 8, 16, 8)),
         _card(739_570_472, 122_240_253_952, 122.3e9, 87.3, 98.3, _hub("L3-256-21K"),
               "mambavision_L3_21k_740m_256.pth.tar", note=_21K, input_size=(256, 256)))
register("mambavision_l3_512", MambaVision, dataclasses.replace(_L3, window_size=(8, 8, 32, 16)),
         _card_512(739_570_472, 488_954_871_808, 489.1e9, 88.1, 98.6, _hub("L3-512-21K"),
               "mambavision_L3_21k_740m_512.pth.tar", note=_AT_512.format(22.8)))
# fmt: on
