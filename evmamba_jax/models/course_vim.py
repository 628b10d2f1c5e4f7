"""The model that a course project calls Vim: not hustvl/Vim, and not bidirectional.

Both of its "directions" scan forwards, and share one scan and one projection; no position embedding tells where a patch
is, and the class token, a parameter, is used by nothing. It is here to repeat the project's experiments, squeeze-and-
excitation, inverted residuals and pruning on CIFAR-10; :mod:`evmamba_jax.models.vim` has the same options.

Source: rdaggs/vim_ssm_cv24 at d2ae6c4, the notebooks in ``vision_mamba`` (SE, MobileNetV2, DynamicPruning), with the
selective scan of zeta 2.8.8.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.backbone import PlainBackbone, PlainConfig, check_images
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.drop_path import Dropout, drop_path_rates, fold_in
from evmamba_jax.layers.inverted_residual import InvertedResidual
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.projections import pointwise_conv
from evmamba_jax.layers.s6 import S6
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.models.registry import register
from evmamba_jax.ranges import ranged
from pallas_kernels import Order

Local = Literal["pointwise", "inverted_residual"]

# All linear layers start as PyTorch's own do.
TorchLinear = pointwise_conv


class CourseMixer(nnx.Module):
    """One projection, seen twice: through a layer of its own each, softplus and the shared scan, times its SiLU.

    Args:
        width: channels C, of the scan too.
        d_state: state size N of the scan.
        dt_rank: rank of the scan's time-step projection.
        squeeze_excite: C over the channels of a gate on the output, from its mean over all tokens; None for no gate.
        local: the layer before each scan: "pointwise", a matrix product, or "inverted_residual", MobileNetV2's block
            along the sequence, with SiLU and 4C channels.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        dtype: compute type; the recurrence is float32 or wider whatever it says.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int,
        dt_rank: int,
        squeeze_excite: int | None = None,
        local: Local = "pointwise",
        implementation: str | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"dtype": dtype, "rngs": rngs}

        def convolution() -> nnx.Module:
            if local == "pointwise":
                return pointwise_conv(width, width, **layer)
            return InvertedResidual(width, size=(3,), act=nnx.silu, **layer)

        self.proj = TorchLinear(width, width, **layer)
        self.conv1 = convolution()
        self.conv2 = convolution()
        self.scan = S6(
            width,
            d_state=d_state,
            dt_rank=dt_rank,
            init=init.ScanInit(dt_bias=init.torch_bias(dt_rank)),
            implementation=implementation,
            rngs=rngs,
        )
        gate = {"layer": TorchLinear, "use_bias": False, **layer}
        self.se = None if squeeze_excite is None else SqueezeExcite(width, squeeze_excite, **gate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map sequences (B, L, C) to (B, L, C)."""
        x = self.proj(x)
        # A sequence is an image of height 1.
        one, two = (self.scan(nnx.softplus(conv(x))[:, None], (Order(),))[:, 0] for conv in (self.conv1, self.conv2))
        y = (one + two) * nnx.silu(x)
        return y if self.se is None else self.se(y)


@dataclasses.dataclass(frozen=True)
class CourseVimConfig(PlainConfig):
    """Options of CourseVim; :class:`PlainConfig` and every family have the others. No weight depends on ``image_size``.

    Attributes:
        d_state: state size N of the scans.
        dt_rank: rank of the scans' time-step projection.
        dropout: probability of dropping each value that enters the first block, in training.
        local: the layer before each scan: "pointwise", a matrix product, or "inverted_residual", MobileNetV2's block
            along the sequence.

    Raises:
        UserError: no blocks, an image_size below one patch, an unknown local, a squeeze_excite above the width.
    """

    num_classes: int = 10
    width: int = 96
    depth: int = 10
    image_size: int | Sequence[int] = 32
    patch_size: int = 4
    d_state: int = ranged(96, least=1)
    dt_rank: int = ranged(16, least=1)
    dropout: float = ranged(0.1, least=0, below=1)
    local: Local = "pointwise"


class CourseVim(PlainBackbone):
    """The course's model: patches, dropout, ``depth`` blocks, the mean over tokens, LayerNorm, head.

    Images of any size from one patch up; pixels beyond the last whole patch are left out. The residual stream is
    float32 or wider. 596,362 parameters as published; 642,442 with ``squeeze_excite=4``; 1,942,282 with
    ``local="inverted_residual"``.
    """

    def __init__(self, config: CourseVimConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        layer = {"dtype": config.dtype, "rngs": rngs}
        width = config.width
        self.patch_embed = TorchLinear(config.in_channels * config.patch_size**2, width, **layer)
        self.cls_token = nnx.Param(init.normal(1.0)(rngs.params(), (1, 1, width), jnp.float32))  # of no use
        self.dropout = Dropout(config.dropout)
        options = config.pick("d_state", "dt_rank", "squeeze_excite", "local", "implementation")

        def block(drop_path: float) -> Block:
            # No dtype: the norm of the residual stream keeps its width; the mixer's projection narrows it.
            return Block(
                width, CourseMixer(width, **options, **layer), None, drop_path=drop_path, dtype=None, rngs=rngs
            )

        (rates,) = drop_path_rates(config.drop_path_rate, [config.depth])
        self.blocks = nnx.List([block(rate) for rate in rates])
        self.norm = LayerNorm(width, rngs=rngs)
        self.head = TorchLinear(width, config.num_classes, **layer) if config.num_classes else None

    def tokens(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return what enters the first block: (B, M, C) of M patches row by row.

        Raises:
            UserError: images of another rank, another number of channels, or smaller than a patch.
        """
        side = self.config.patch_size
        check_images(images, self.in_channels, side)
        rows, columns = self.config.grid_of(*images.shape[1:3])
        patches = images[:, : rows * side, : columns * side]
        x = self.patch_embed(rearrange(patches, "b (h p) (w q) c -> b (h w) (p q c)", p=side, q=side))
        # The number of no block: the blocks draw with theirs.
        x = self.dropout(x, fold_in(key, len(self.blocks)))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """Return the residual stream after each quarter of the blocks as maps [(B, h, w, C), ...].

        All four are of one size, and float32 or wider.

        Args:
            images: (B, H, W, in_channels) normalised floats, H and W at least ``patch_size``.
            key: random key for dropout and drop path; needed in training mode where either rate is not zero.

        Raises:
            UserError: images of another rank, another number of channels, or smaller than a patch.
        """
        rows, columns = self.config.grid_of(*images.shape[1:3])
        streams = self.streams(self.tokens(images, key=key), key, self.quarters)
        return [x.reshape(x.shape[0], rows, columns, -1) for x in streams]

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits (B, num_classes); arguments and errors as for :meth:`features`."""
        (x,) = self.streams(self.tokens(images, key=key), key, [len(self.blocks)])
        x = self.norm(x.mean(1))
        return x if self.head is None else self.head(x)


register("course_vim", CourseVim, CourseVimConfig())
register("course_vim_deep", CourseVim, CourseVimConfig(width=256, d_state=256, dt_rank=32, patch_size=16))
