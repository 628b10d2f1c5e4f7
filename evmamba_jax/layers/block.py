"""The residual block of VMamba, MSVMamba, Vim and MambaVision: a token mixer, then perhaps a channel mixer."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.drop_path import DropPath, fold_in
from evmamba_jax.layers.norm import LayerNorm


class Block(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm2(x))``, each branch with drop path and layer scale if asked.

    Args:
        width: channels C.
        mixer: module from (B, ..., C) to (B, ..., C).
        mlp: another one; None for a block of one branch.
        drop_path: probability of dropping a branch of a sample; the two branches draw separately.
        layer_scale: initial value of a learned factor for each channel of each branch; None for no factor.
        post_norm: the second branch is ``norm2(mlp(x))``.
        norm: what normalises.
        dtype: compute type.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        width: int,
        mixer: nnx.Module,
        mlp: nnx.Module | None,
        *,
        drop_path: float,
        layer_scale: float | None = None,
        post_norm: bool = False,
        norm: Callable[..., nnx.Module] = LayerNorm,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        def gamma():
            return None if layer_scale is None else nnx.Param(init.full(width, layer_scale))

        self.norm = norm(width, dtype=dtype, rngs=rngs)
        self.mixer = mixer
        self.gamma_1 = gamma()
        self.norm2 = None if mlp is None else norm(width, dtype=dtype, rngs=rngs)
        self.mlp = mlp
        self.gamma_2 = None if mlp is None else gamma()
        self.drop_path = DropPath(drop_path)
        self.post_norm = post_norm

    def __call__(self, x: jax.Array, key: jax.Array | None = None, **given: Any) -> jax.Array:
        """Map (B, ..., C) to (B, ..., C); ``key`` draws the drop path in training mode, the mixer is ``given`` more."""
        x = x + self.drop_path(scaled(self.mixer(self.norm(x), **given), self.gamma_1), fold_in(key, 0))
        if self.mlp is None or self.norm2 is None:
            return x
        y = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return x + self.drop_path(scaled(y, self.gamma_2), fold_in(key, 1))


def scaled(x: jax.Array, gamma: nnx.Param | None) -> jax.Array:
    """Return a branch times a learned factor for each channel, if there is one, in the type of the branch."""
    # A float32 factor would turn a bfloat16 residual stream into float32.
    return x if gamma is None else x * gamma[...].astype(x.dtype)
