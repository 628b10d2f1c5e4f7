"""VMamba: visual state-space model with cross-scan, its first version and the current one.

Source: Liu et al., VMamba (arXiv:2401.10166); MzeroMiko/VMamba ``classification/models/vmamba.py`` at 2ed52ea. Where
the two differ this file follows the code: the stem ends at a quarter of the image's size, Euler's rule discretises B.
"""

import dataclasses
import functools
from collections.abc import Sequence

from flax import nnx

from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers.activations import Activation
from evmamba_jax.layers.backbone import StagedBackbone, StagedConfig
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.initializers import SCAN_INITS
from evmamba_jax.layers.mlp import Mlp
from evmamba_jax.layers.patches import PATCHES
from evmamba_jax.layers.ss2d import SS2D, Scan
from evmamba_jax.models.registry import ModelCard, register
from evmamba_jax.ranges import chosen, ranged, stated
from pallas_kernels import CROSS, Chain, Order

# The scan patterns of the paper's table 10, each with four sets of parameters; cascade_aligned is ours (see SS2D).
SCANS: dict[str, Scan] = {
    "cross": CROSS,
    "unidirectional": (Order(),) * 4,
    "bidirectional": (Order(),) * 2 + (Order(reverse=True),) * 2,
    "cascade": "cascade",
    "cascade_aligned": "cascade_aligned",
}


@dataclasses.dataclass(frozen=True)
class VMambaConfig(StagedConfig):
    """Options of VMamba; every family of four stages has the others.

    Attributes:
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

    Raises:
        UserError: depths that are not four, an unknown act, init or scan.
    """

    width: int = ranged(96, least=2)  # of which an overlapping stem takes half
    depths: Sequence[int] = (2, 2, 8, 2)
    d_state: int = ranged(1, least=1)
    ssm_ratio: float = ranged(1.0, above=0)
    mlp_ratio: float = ranged(4.0, least=0)
    overlap: bool = True
    gate: bool = False
    conv: bool = True
    conv_bias: bool = False
    act: Activation = "silu"
    init: str = chosen("mamba", SCAN_INITS)
    scan: str | Scan = stated("cross", "a scan", lambda scan: True)  # noqa: RUF009

    def __post_init__(self):
        super().__post_init__()
        orders = self.orders
        if not isinstance(orders, str) and not (
            isinstance(orders, tuple) and orders and all(isinstance(order, Order | Chain) for order in orders)
        ):
            raise UserError(
                f"scan is {orders!r}; allowed: {', '.join(map(repr, SCANS))}, or a tuple of Order or Chain values"
            )

    @property
    def orders(self) -> Scan:
        """The scan as SS2D takes it."""
        return one_of("scan", self.scan, SCANS) if isinstance(self.scan, str) else self.scan


class VMamba(StagedBackbone):
    """VMamba: four stages of blocks ``x + SS2D(norm(x))``, ``x + MLP(norm(x))``.

    Images of any size: from one pixel up with overlapping stems, from 4x4 with the first version's patches.
    """

    def __init__(self, config: VMambaConfig, *, rngs: nnx.Rngs):
        layer = {"dtype": config.dtype, "rngs": rngs}
        scan = config.pick("d_state", "ssm_ratio", "gate", "conv", "conv_bias", "act", "implementation")
        scan["init"] = SCAN_INITS[config.init]

        def block(_stage: int, _number: int, c: int, drop_path: float) -> Block:
            mixer = SS2D(c, config.orders, **scan, **layer)
            mlp = Mlp(c, int(config.mlp_ratio * c), **layer) if config.mlp_ratio else None
            return Block(c, mixer, mlp, drop_path=drop_path, **layer)

        stem, halve = PATCHES[config.overlap]
        patch_embed = stem(config.in_channels, config.width, **layer)
        super().__init__(config, patch_embed, block, functools.partial(halve, **layer), rngs=rngs)


_card = functools.partial(
    ModelCard, paper="2401.10166", licence="MIT", licence_note="LICENSE of the repository that releases them"
)
_V2 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"
_V0 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/"

# s = ssm_ratio, l = blocks of the third stage. The plain names are the models of the paper's main table.
# fmt: off
register("vmamba_t", VMamba, VMambaConfig(),
         _card(30_249_064, 4_875_843_072, 4.9e9, 82.6, None, _V2, "vssm1_tiny_0230s_ckpt_epoch_264.pth"))
register("vmamba_t_s2l5", VMamba, VMambaConfig(depths=(2, 2, 5, 2), ssm_ratio=2.0),
         _card(30_705_832, 4_824_588_288, 4.9e9, 82.5, None, _V2, "vssm_tiny_0230_ckpt_epoch_262.pth"))
register("vmamba_s", VMamba, VMambaConfig(depths=(2, 2, 15, 2), ssm_ratio=2.0),
         _card(50_147_752, 8_667_568_128, 8.7e9, 83.6, None, _V2, "vssm_small_0229_ckpt_epoch_222.pth"))
register("vmamba_s_s1l20", VMamba, VMambaConfig(depths=(2, 2, 20, 2)),
         _card(49_012_840, 8_568_897_024, 8.6e9, 83.3, None, _V2, "vssm1_small_0229s_ckpt_epoch_240.pth"))
register("vmamba_b", VMamba, VMambaConfig(width=128, depths=(2, 2, 15, 2), ssm_ratio=2.0),
         _card(88_557_800, 15_294_668_800, 15.4e9, 83.9, None, _V2, "vssm_base_0229_ckpt_epoch_237.pth"))
register("vmamba_b_s1l20", VMamba, VMambaConfig(width=128, depths=(2, 2, 20, 2)),
         _card(86_614_504, 15_163_107_328, 15.2e9, 83.8, None, _V2, "vssm1_base_0229s_ckpt_epoch_225.pth"))

_FIRST = VMambaConfig(d_state=16, ssm_ratio=2.0, mlp_ratio=0.0, overlap=False, gate=True, conv_bias=True)
_S_V0 = dataclasses.replace(_FIRST, depths=(2, 2, 27, 2))

register("vmamba_t_v0", VMamba, dataclasses.replace(_FIRST, depths=(2, 2, 9, 2)),
         _card(22_893_448, 5_597_700_096, 5.6e9, 82.2, None, _V0, "vssmtiny_dp01_ckpt_epoch_292.pth",
               note="Trained with drop path 0.1; the official yaml says 0.2."))
register("vmamba_s_v0", VMamba, _S_V0,
         _card(44_417_416, 11_181_987_840, 11.2e9, 83.5, None, _V0, "vssmsmall_dp03_ckpt_epoch_238.pth"))
register("vmamba_b_v0", VMamba, dataclasses.replace(_S_V0, width=128),
         _card(76_254_056, 17_953_595_392, 18.0e9, 83.7, None, _V0, "vssmbase_dp06_ckpt_epoch_241.pth"))
# fmt: on
