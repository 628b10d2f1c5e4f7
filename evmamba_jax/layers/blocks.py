"""Blocks one after another: as they are, or equal ones as one loop, which is compiled once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import checkpoint_policies as policies

from evmamba_jax.errors import one_of
from evmamba_jax.layers.drop_path import Drop, fold_in

# Which activations of a block the backward pass finds; it computes the others again. None: it finds all.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "block": policies.nothing_saveable,  # only the block's input
    "dots_and_scans": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("dot", "scan")
    ),
}

FEWEST = 3  # equal blocks that make a loop; two compile about as fast without one

# Equal blocks that a CPU runs one by one in evaluation: to stack their arrays takes it longer than a block.
MOST_APART = 16


def run_blocks(
    blocks: Sequence[Any],
    x: jax.Array,
    key: jax.Array | None,
    *,
    training: bool,
    remat: str,
    first: int = 0,
    **given: Any,
) -> jax.Array:
    """Map ``x`` through ``blocks``, each from (B, ..., C) to the same shape.

    Consecutive equal blocks are one ``jax.lax.scan`` over their stacked arrays where their activations are not kept: in
    evaluation, and in training with rematerialisation. Training without it runs the blocks as they are, because a loop
    stacks all that it keeps, in three times the memory; a CPU does so too in evaluation, up to 16 blocks, because to
    stack their arrays takes time. Arrays are stacked inside the traced function, so their paths in the model and their
    shardings stay. Outside of a traced function nothing is compiled, and nothing looped.

    Args:
        blocks: modules with ``block(x, key)``.
        x: (B, ..., C).
        key: draws drop path in training; block ``i`` gets ``fold_in(key, first + i)``.
        training: whether the blocks are in training mode.
        remat: a name of ``REMAT``.
        first: number of the first block.
        **given: what every block is called with beside x and its key; no arrays.

    Raises:
        UserError: an unknown ``remat``.
    """
    policy = one_of("remat", remat, REMAT)
    if not isinstance(x, jax.core.Tracer) or (training and policy is None):
        for number, block in enumerate(blocks, first):
            x = block(x, fold_in(key, number), **given)
        return x

    parts = [_take_apart(number, block) for number, block in enumerate(blocks, first)]
    for (structure, _), group in groupby(parts, key=lambda part: (part.structure, part.shapes)):
        run = list(group)
        loop = len(run) >= FEWEST
        step = _step(structure, np.max([part.rates for part in run], axis=0), key, training, given)
        if policy is not None:
            # Within a loop the compiler cannot merge the second computation with the first, which would keep all.
            step = jax.checkpoint(step, policy=policy, prevent_cse=not loop)
        if loop:
            x, stats = _loop(step, x, [part.inputs for part in run], training)
        else:
            stats = []
            for part in run:
                x, own = step(x, part.inputs)
                stats.append(own)
        if training:
            for part, own in zip(run, stats, strict=True):
                nnx.update(part.block, own)
    return x


def _loop(step: Callable[..., Any], x: jax.Array, inputs: list[Any], training: bool) -> tuple[jax.Array, list[Any]]:
    """Return what the last step makes of x, and the batch statistics of each."""

    def one_by_one(x, inputs):
        once = jax.jit(step)  # traced and lowered once
        for own in inputs:
            x, _ = once(x, own)
        return x

    def stacked(x, inputs):
        return jax.lax.scan(step, x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *inputs))

    if training:
        x, stats = stacked(x, inputs)
        return x, [jax.tree.map(lambda array, i=i: array[i], stats) for i in range(len(inputs))]
    by_platform = {"cpu": one_by_one} if len(inputs) <= MOST_APART else {}
    return jax.lax.platform_dependent(x, inputs, **by_platform, default=lambda *given: stacked(*given)[0]), []


class _Parts(NamedTuple):
    """A block taken apart into its structure, which a loop's blocks share, and what differs from block to block."""

    block: Any
    structure: Any  # without the rates of drop path
    shapes: list[tuple]
    rates: list[float]
    inputs: tuple[nnx.State, jax.Array, int]  # arrays, shares that drop path keeps, number


def _take_apart(number: int, block: Any) -> _Parts:
    structure, state = nnx.split(block)
    twin = nnx.merge(structure, state)
    drops = _drops(twin)
    rates = [drop.rate for drop in drops]
    for drop in drops:
        drop.rate = 0.0
    # 1 - rate as the block itself computes it, in float64, then in the type that JAX gives a Python number.
    keep = jnp.asarray([1 - rate for rate in rates], float)
    shapes = [(array.shape, array.dtype) for array in jax.tree.leaves(state)]
    return _Parts(block, nnx.graphdef(twin), shapes, rates, (state, keep, number))


def _step(
    structure: Any, rates: Sequence[float], key: jax.Array | None, training: bool, given: Mapping[str, Any]
) -> Callable[..., Any]:
    """Return ``step(x, inputs) -> (y, batch statistics)`` of blocks whose largest rates of drop path are ``rates``."""

    def step(x, inputs):
        state, keep, number = inputs
        block = nnx.merge(structure, state)
        for i, drop in enumerate(_drops(block)):
            drop.rate, drop.keep = float(rates[i]), nnx.data(keep[i])
        return block(x, fold_in(key, number), **given), nnx.state(block, nnx.BatchStat) if training else None

    return step


def _drops(block: Any) -> list[Drop]:
    return [module for _, module in nnx.iter_modules(block) if isinstance(module, Drop)]
