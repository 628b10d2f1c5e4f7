"""The selective scan with its parameters: what every family here is built around."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evmamba_jax.layers.initializers import ScanInit, full
from evmamba_jax.ops import scan2d
from pallas_kernels import Chain, Order


class S6(nnx.Module):
    """Selective scan of a map: from each pixel its step size, input and output weights, then the recurrence.

    Holds K sets of parameters, and runs along orders given by the caller, one set an order. The recurrence, its decays
    and time steps are float32 or wider whatever the type of the map.

    Args:
        channels: E, of the map.
        sets: K.
        d_state: state size N of every channel.
        dt_rank: rank R of the time-step projection.
        init: initial values.
        dt_bias_factor: what the bias of the time step is multiplied with.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        rngs: source of the initial values.

    Source: Gu and Dao, Mamba, section 3; state-spaces/mamba ``selective_scan_ref``.
    """

    def __init__(
        self,
        channels: int,
        sets: int = 1,
        *,
        d_state: int,
        dt_rank: int,
        init: ScanInit = ScanInit(),  # noqa: B008 - immutable
        dt_bias_factor: float = 1.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.x_proj = nnx.Param(init.x_proj(rngs.params(), (sets, channels, dt_rank + 2 * d_state), jnp.float32))
        self.dt_proj = nnx.Param(init.dt_proj(rngs.params(), (sets, dt_rank, channels), jnp.float32))
        self.dt_bias = nnx.Param(init.dt_bias(rngs.params(), (sets, channels), jnp.float32))
        self.A_log = nnx.Param(init.a_log(rngs.params(), (sets, channels, d_state), jnp.float32))
        self.D = nnx.Param(full((sets, channels), 1))
        self.dt_bias_factor = dt_bias_factor
        self.implementation = implementation

    def __call__(
        self, x: jax.Array, orders: Sequence[Order | Chain], *, sets: Sequence[int] | None = None
    ) -> jax.Array:
        """Scan a map (B, H, W, E) along each of ``orders`` and return the sum, of the same shape and dtype.

        ``sets`` names the parameters of each order by number; None takes all K in turn.
        """

        def chosen(parameter):
            return parameter[...] if sets is None else jnp.stack([parameter[...][i] for i in sets])

        a_log = chosen(self.A_log)
        y = scan2d(
            x,
            chosen(self.x_proj),
            chosen(self.dt_proj),
            self.dt_bias_factor * chosen(self.dt_bias),
            -jnp.exp(a_log.astype(jnp.promote_types(x.dtype, a_log.dtype))),
            chosen(self.D),
            orders=tuple(orders),
            implementation=self.implementation,
        )
        # Without the barrier XLA writes a bfloat16 y down a second time in float32, for the norm that follows.
        return checkpoint_name(jax.lax.optimization_barrier(y), "scan")


def default_dt_rank(width: int) -> int:
    """Return the rank R of the time-step projection for a block of this width, dt_rank "auto" in the official code."""
    return math.ceil(width / 16)
