"""The 2-D selective-scan operator shared by the VMamba line of models."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.projections import Linear, depthwise_conv
from pallas_kernels import Order, scan2d


class SS2D(nnx.Module):
    """Gated 2-D selective scan: project, depthwise convolution, scan along ``orders``, normalise, gate, project.

    Args:
        width: channels C of the map.
        orders: the scan orders, one set of scan parameters each (K).
        d_state: state size N of every channel.
        ssm_ratio: inner width E = ssm_ratio * C.
        dt_rank: rank R of the time-step projection; ``None`` means ceil(C / 16).
        dtype: compute type; the recurrence is float32 or wider whatever it says.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        rngs: source of the initial values.

    Source: VMamba section 4; EfficientVMamba section 3; TerryPei/EfficientVMamba ``SS2D``.
    """

    def __init__(
        self,
        width: int,
        orders: tuple[Order, ...],
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        dtype: Dtype | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        inner = int(ssm_ratio * width)
        rank = dt_rank or math.ceil(width / 16)
        self.orders = orders
        self.implementation = implementation
        self.in_proj = Linear(width, 2 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv2d = depthwise_conv(inner, dtype=dtype, rngs=rngs)
        k = len(orders)
        self.x_proj_weight = nnx.Param(init.uniform(inner**-0.5)(rngs.params(), (k, inner, rank + 2 * d_state)))
        self.dt_proj_weight = nnx.Param(init.uniform(rank**-0.5)(rngs.params(), (k, rank, inner)))
        self.dt_proj_bias = nnx.Param(init.dt_bias(rngs.params(), (k, inner)))
        self.A_log = nnx.Param(init.a_log(rngs.params(), (k, inner, d_state)))
        self.D = nnx.Param(jnp.ones((k, inner)))
        self.out_norm = LayerNorm(inner, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        x = nnx.silu(self.conv2d(x))
        y = scan2d(
            x,
            self.x_proj_weight[...],
            self.dt_proj_weight[...],
            self.dt_proj_bias[...],
            -jnp.exp(self.A_log[...].astype(jnp.promote_types(x.dtype, self.A_log.dtype))),
            self.D[...],
            orders=self.orders,
            implementation=self.implementation,
        )
        return self.out_proj(self.out_norm(y) * nnx.silu(z))
