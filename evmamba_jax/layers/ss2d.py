"""The 2-D selective-scan operator of VMamba and EfficientVMamba."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.activations import ACTIVATIONS, Activation
from evmamba_jax.layers.channels import Group, Member, conv_members, scan_members
from evmamba_jax.layers.initializers import ScanInit
from evmamba_jax.layers.norm import LayerNorm, counted
from evmamba_jax.layers.projections import Linear, depthwise_conv
from evmamba_jax.layers.s6 import S6, default_dt_rank
from pallas_kernels import Chain, Order

Scan = tuple[Order | Chain, ...] | Literal["cascade", "cascade_aligned"]


class SS2D(nnx.Module):
    """2-D selective scan: project, depthwise convolution, scan along ``orders``, normalise, gate, project.

    Args:
        width: channels C of the map.
        orders: the scan orders, one set of scan parameters each (K); or "cascade", which scans every row there and
            back, normalises, and scans every column of the result there and back. As in the official code, what the
            way back gives is added in its own order, so that each pixel gets its mirror image's; with
            "cascade_aligned" each gets its own.
        d_state: state size N of every channel.
        ssm_ratio: inner width E = ssm_ratio * C.
        gate: multiply the result with a second projection of the input.
        conv: depthwise 3x3 convolution before the scan.
        conv_bias: give it a bias.
        act: activation before the scan and on the gate, "silu", "gelu" or "relu".
        init: initial values of the scan parameters.
        dtype: compute type; the recurrence is float32 or wider whatever it says.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        rngs: source of the initial values.

    Source: VMamba section 4; EfficientVMamba section 3; MzeroMiko/VMamba ``SS2D``, forward types v0 (gated) and
    v05_noz, and its ablations v051d, v052d and v052dc.
    """

    def __init__(
        self,
        width: int,
        orders: Scan,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        gate: bool = True,
        conv: bool = True,
        conv_bias: bool = True,
        act: Activation = "silu",
        init: ScanInit = ScanInit(),  # noqa: B008 - immutable
        dtype: Dtype | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        inner = int(ssm_ratio * width)
        self.orders = orders
        self.act = ACTIVATIONS[act]
        self.in_proj = Linear(width, (2 if gate else 1) * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv2d = depthwise_conv(inner, use_bias=conv_bias, dtype=dtype, rngs=rngs) if conv else None
        self.scan = S6(
            inner,
            4 if isinstance(orders, str) else len(orders),
            d_state=d_state,
            dt_rank=default_dt_rank(width),
            init=init,
            implementation=implementation,
            rngs=rngs,
        )
        self.out_norm = LayerNorm(inner, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate = gate
        self.between = LayerNorm(inner, use_scale=False, use_bias=False, dtype=dtype, rngs=rngs)  # of the cascade

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = self.in_proj(x)
        z = None
        if self.gate:
            x, z = jnp.split(x, 2, axis=-1)
        if self.conv2d is not None:
            x = self.conv2d(x)
        x = self.act(x)
        y = self._cascade(x) if isinstance(self.orders, str) else self.scan(x, self.orders)
        y = self.out_norm(y)
        return self.out_proj(y if z is None else y * self.act(z))

    def channel_groups(self) -> list[Group]:
        """Return the channels of the scan; a cascade has none, as its norms between two scans fill dead channels."""
        if isinstance(self.orders, str):
            return []
        inner = self.out_proj.kernel.shape[0]
        halves = range(2 if self.gate else 1)
        members = [Member("in_proj.kernel", 1, half * inner, weight=True) for half in halves]
        if self.conv2d is not None:
            members += conv_members("conv2d", self.conv2d)
        members += [*scan_members("scan"), Member("out_norm.scale", 0), Member("out_norm.bias", 0)]
        return [Group("", inner, (*members, Member("out_proj.kernel", 0, weight=True)))]

    def channels_cut(self) -> None:
        """Let the norm go on dividing by the channels that there were."""
        self.out_norm = counted(self.out_norm)

    def _cascade(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        rows = self._there_and_back(rearrange(self.between(x), "b h w e -> (b h) 1 w e"), 0, 1)
        columns = self.between(rearrange(rows, "(b h) 1 w e -> b w h e", h=height))
        columns = self._there_and_back(rearrange(columns, "b w h e -> (b w) 1 h e"), 2, 3)
        return rearrange(columns, "(b w) 1 h e -> b h w e", w=width)

    def _there_and_back(self, lines: jax.Array, there: int, back: int) -> jax.Array:
        y = self.scan(jnp.flip(lines, 2), (Order(),), sets=(back,))
        if self.orders == "cascade_aligned":
            y = jnp.flip(y, 2)
        return self.scan(lines, (Order(),), sets=(there,)) + y
