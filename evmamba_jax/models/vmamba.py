"""VMamba: visual state-space model with cross-scan, its first version and the current one.

Source: Liu et al., VMamba (arXiv:2401.10166); MzeroMiko/VMamba ``classification/models/vmamba.py`` at 2ed52ea. Where
the two differ this file follows the code: the stem ends at a quarter of the image's size, Euler's rule discretises B.
"""

import functools
from collections.abc import Sequence
from typing import Literal

from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.initializers import SCAN_INITS
from evmamba_jax.layers.mlp import ACTIVATIONS, Activation, Mlp
from evmamba_jax.layers.patches import PATCHES
from evmamba_jax.layers.pyramid import Pyramid, Stage, stage_parts
from evmamba_jax.layers.ss2d import SS2D, Scan
from evmamba_jax.models.registry import register
from pallas_kernels import CROSS, Chain, Order

# The scan patterns of the paper's table 10, each with four sets of parameters; cascade_aligned is ours (see SS2D).
SCANS: dict[str, Scan] = {
    "cross": CROSS,
    "unidirectional": (Order(),) * 4,
    "bidirectional": (Order(),) * 2 + (Order(reverse=True),) * 2,
    "cascade": "cascade",
    "cascade_aligned": "cascade_aligned",
}


class VMamba(Pyramid):
    """VMamba: four stages of blocks ``x + SS2D(norm(x))``, ``x + MLP(norm(x))``.

    Images of any size: from one pixel up with overlapping stems, from 4x4 with the first version's patches.

    Args:
        width: channels C of the first stage; every stage doubles them.
        depths: blocks of each of the four stages.
        d_state: state size N of the scans.
        ssm_ratio: inner width of the scans over C.
        mlp_ratio: hidden width of the MLP over C; 0 leaves it out.
        overlap: stem and downsampling by overlapping 3x3 convolutions (stem v2, downsample v3); False cuts into
            patches (v1 and v1).
        gate: multiply the scans' result with SiLU of a second projection.
        conv: depthwise 3x3 convolution before the scans.
        conv_bias: give it a bias.
        act: activation in SS2D: "silu", "gelu" or "relu".
        init: initial values of the scan parameters: "mamba", "random" or "zero".
        scan: "cross", "unidirectional", "bidirectional", "cascade", "cascade_aligned", or a tuple of your own orders.
        num_classes, in_channels, drop_path_rate, out_norms, dtype, rngs: as all four-stage families have them, see
            :class:`~evmamba_jax.layers.pyramid.Pyramid`.

    Raises:
        UserError: depths that are not four, an unknown act, init or scan.
    """

    def __init__(
        self,
        *,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        num_classes: int = 1000,
        in_channels: int = 3,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        overlap: bool = True,
        gate: bool = False,
        conv: bool = True,
        conv_bias: bool = False,
        act: Activation = "silu",
        init: Literal["mamba", "random", "zero"] = "mamba",
        scan: str | Scan = "cross",
        drop_path_rate: float = 0.0,
        out_norms: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        one_of("act", act, ACTIVATIONS)
        scan_init = one_of("init", init, SCAN_INITS)
        orders = one_of("scan", scan, SCANS) if isinstance(scan, str) else scan
        if not isinstance(orders, str) and not (
            isinstance(orders, tuple) and orders and all(isinstance(order, Order | Chain) for order in orders)
        ):
            raise UserError(
                f"scan is {scan!r}; allowed: {', '.join(map(repr, SCANS))}, or a tuple of Order or Chain values"
            )
        stem, halve = PATCHES[overlap]
        patch_embed = stem(in_channels, width, dtype=dtype, rngs=rngs)

        def block(_stage: int, _number: int, c: int, drop_path: float) -> Block:
            mixer = SS2D(
                c,
                orders,
                d_state=d_state,
                ssm_ratio=ssm_ratio,
                gate=gate,
                conv=conv,
                conv_bias=conv_bias,
                act=act,
                init=scan_init,
                dtype=dtype,
                rngs=rngs,
            )
            mlp = Mlp(c, int(mlp_ratio * c), dtype=dtype, rngs=rngs) if mlp_ratio else None
            return Block(c, mixer, mlp, drop_path=drop_path, dtype=dtype, rngs=rngs)

        parts = stage_parts(width, depths, drop_path_rate, block, functools.partial(halve, dtype=dtype, rngs=rngs))
        super().__init__(
            patch_embed,
            [Stage(*part) for part in parts],
            width,
            num_classes=num_classes,
            out_norms=out_norms,
            in_channels=in_channels,
            dtype=dtype,
            rngs=rngs,
        )


_FIRST = {"d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0, "overlap": False, "gate": True, "conv_bias": True}

# s = ssm_ratio, l = blocks of the third stage. The plain names are the models of the paper's main table.
register("vmamba_t", VMamba, width=96, depths=(2, 2, 8, 2), ssm_ratio=1.0)
register("vmamba_t_s2l5", VMamba, width=96, depths=(2, 2, 5, 2), ssm_ratio=2.0)
register("vmamba_s", VMamba, width=96, depths=(2, 2, 15, 2), ssm_ratio=2.0)
register("vmamba_s_s1l20", VMamba, width=96, depths=(2, 2, 20, 2), ssm_ratio=1.0)
register("vmamba_b", VMamba, width=128, depths=(2, 2, 15, 2), ssm_ratio=2.0)
register("vmamba_b_s1l20", VMamba, width=128, depths=(2, 2, 20, 2), ssm_ratio=1.0)
register("vmamba_t_v0", VMamba, width=96, depths=(2, 2, 9, 2), **_FIRST)
register("vmamba_s_v0", VMamba, width=96, depths=(2, 2, 27, 2), **_FIRST)
register("vmamba_b_v0", VMamba, width=128, depths=(2, 2, 27, 2), **_FIRST)
