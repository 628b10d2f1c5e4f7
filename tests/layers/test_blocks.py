"""Blocks as one loop against the same blocks one after another: values, gradients, statistics, types and memory."""

import functools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.arrays import merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.blocks import run_blocks
from evmamba_jax.layers.drop_path import DropPath
from evmamba_jax.layers.inverted_residual import InvertedResidual
from evmamba_jax.layers.mlp import Mlp
from evmamba_jax.layers.norm import RMSNorm
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.efficientvmamba import EVSSBlock
from evmamba_jax.models.mambavision import Attention
from evmamba_jax.models.vim import VimMixer
from pallas_kernels import Order

WIDTH = 8
RATES = (0.0, 0.2, 0.4, 0.6)


def evss(rate, rngs):
    return EVSSBlock(WIDTH, d_state=2, ssm_ratio=1.0, drop_path=rate, dtype=None, rngs=rngs)


def inverted_residual(rate, rngs):
    return InvertedResidual(WIDTH, squeeze_excite=8, drop_path=rate, dtype=None, rngs=rngs)


def vim(rate, rngs, dtype=None):
    mixer = VimMixer(WIDTH, d_state=2, dtype=dtype, rngs=rngs)
    return Block(WIDTH, mixer, None, drop_path=rate, norm=RMSNorm, dtype=None, rngs=rngs)


def attention(rate, rngs, dtype=None):
    mixer, mlp = Attention(WIDTH, 2, dtype=dtype, rngs=rngs), Mlp(WIDTH, 16, dtype=dtype, rngs=rngs)
    return Block(WIDTH, mixer, mlp, drop_path=rate, layer_scale=0.5, dtype=dtype, rngs=rngs)


GRID, TOKENS = (4, 3, 4, WIDTH), (4, 5, WIDTH)
KINDS = [
    (evss, GRID, "dots_and_scans"),
    (inverted_residual, GRID, "block"),
    (vim, TOKENS, "block"),
    (attention, TOKENS, "dots_and_scans"),
]


def one_by_one(blocks, x, key):
    for number, block in enumerate(blocks):
        x = block(x, jax.random.fold_in(key, number))
    return x


def in_training(remat):
    return functools.partial(run_blocks, training=True, remat=remat)


class Results(NamedTuple):
    output: chex.Array
    batch_stats: dict  # after it
    of_params: dict  # gradients
    of_input: chex.Array


class Drop(nnx.Module):
    """Drop path whose rate is an array, so that blocks that differ in it alone are one program."""

    def __init__(self, rate):
        self.rate = nnx.Variable(rate)

    def __call__(self, x, key):
        kept = jax.random.bernoulli(key, 1 - self.rate[...], (len(x),) + (1,) * (x.ndim - 1))
        return x * kept / (1 - self.rate[...])


@jax.jit
def step(block, x, key, cotangent):
    """Return a block's output, batch statistics, and gradients of parameters and input."""
    graphdef, params, *rest = nnx.split(block, nnx.Param, ...)

    def run(params, x):
        block = nnx.merge(graphdef, params, *rest, copy=True)
        return block(x, key), nnx.state(block, nnx.BatchStat)

    y, vjp, stats = jax.vjp(run, params, x, has_aux=True)
    return y, stats, *vjp(cotangent)


def by_blocks(blocks, x, key, out_weights):
    """Return what :func:`looped` does, block by block there and block by block back."""
    blocks = nnx.merge(*nnx.split(blocks))
    for block, rate in zip(blocks, RATES, strict=True):
        block.drop_path = Drop(np.float64(rate))
    keys, inputs, stats, gradients = [jax.random.fold_in(key, i) for i in range(len(blocks))], [x], [], []
    for block, own in zip(blocks, keys, strict=True):
        y, after, *_ = step(block, inputs[-1], own, np.zeros_like(x))
        inputs.append(y)
        stats.append(after)
    cotangent = out_weights
    for block, own, x in zip(reversed(blocks), reversed(keys), reversed(inputs[:-1]), strict=True):
        _, _, gradient, cotangent = step(block, x, own, cotangent)
        gradients.insert(0, gradient)
    return Results(inputs[-1], flat(stats), flat(gradients), cotangent)


def flat(states):
    """Return the states of blocks as one dictionary with the paths of :func:`split`."""
    return {
        f"{i}.{'.'.join(map(str, path))}": variable[...]
        for i, state in enumerate(states)
        for path, variable in nnx.to_flat_state(state)
    }


def looped(remat, blocks, x, key, out_weights):
    graphdef, params, stats = split(blocks)

    def loss(params, x):
        blocks = merge(graphdef, params, stats)
        y = run_blocks(blocks, x, key, training=True, remat=remat)
        return (y * out_weights).sum(), (y, split(blocks).batch_stats)

    (of_params, of_input), (y, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return Results(y, stats, of_params, of_input)


@pytest.mark.parametrize(("kind", "shape", "remat"), KINDS, ids=[kind.__name__ for kind, *_ in KINDS])
def test_a_loop_computes_what_the_blocks_compute(kind, shape, remat):
    rng = np.random.default_rng(1)
    graphdef, params, stats = split(nnx.List([kind(rate, nnx.Rngs(i)) for i, rate in enumerate(RATES)]))
    # Fresh norms are all alike, which would not show blocks that are mixed up.
    params, stats = ({path: a + 0.1 * rng.random(a.shape) for path, a in given.items()} for given in (params, stats))
    x, out_weights = rng.normal(size=(2, *shape))
    with jax.enable_x64(True):
        params, stats = jax.tree.map(jnp.asarray, (params, stats))
        blocks = merge(graphdef, params, stats)
        evaluate = jax.jit(lambda blocks, x: run_blocks(blocks, x, None, training=False, remat="none"))
        evaluate_one, block_by_block = jax.jit(lambda block, x: block(x)), x
        for block in merge(graphdef, params, stats):
            block.drop_path.rate = 0.0  # which is not used, so that one program serves all
            block_by_block = evaluate_one(block, block_by_block)
        chex.assert_trees_all_close(evaluate(blocks, x), block_by_block, rtol=1e-9)

        blocks.train()
        given = blocks, x, jax.random.key(0), out_weights
        expected = by_blocks(*given)
        assert np.abs(expected.output - block_by_block).max() > 0.1  # drop path took something
        ours = looped(remat, *given)
        chex.assert_trees_all_equal_dtypes(ours, expected)
        # A gradient that is exactly zero, as of a bias before a batch norm, is noise of 1e-16 in both.
        chex.assert_trees_all_close(ours, expected, rtol=1e-9, atol=1e-12)


class Toy(nnx.Module):
    def __init__(self, rate, size=3):
        self.weight = nnx.Param(jnp.arange(1.0, size + 1))
        self.drop_path = DropPath(rate)

    def __call__(self, x, key):
        return x + self.drop_path(x * self.weight[...].sum(), key)


@pytest.mark.parametrize(
    ("training", "remat", "sizes", "loops", "on_cpu"),
    [
        (False, "none", (3,) * 4, [4], []),  # to stack the arrays would take a CPU long
        (False, "none", (3,) * 17, [17], [17]),
        (True, "block", (3,) * 4, [4], [4]),
        (True, "none", (3,) * 4, [], []),  # which would stack all that the backward pass needs
        (False, "none", (3, 3), [], []),
        (False, "none", (3, 3, 4, 4, 4, 3), [3], []),  # blocks of other shapes are others
    ],
)
def test_which_blocks_are_a_loop(training, remat, sizes, loops, on_cpu):
    blocks = [Toy(0.1 * (i % 4), size) for i, size in enumerate(sizes)]
    program = jax.jit(lambda x: run_blocks(blocks, x, jax.random.key(0), training=training, remat=remat))
    for platform, expected in (("tpu", loops), ("cuda", loops), ("cpu", on_cpu)):
        lowered = program.trace(jnp.ones(3)).lower(lowering_platforms=(platform,)).as_text()
        # The loops of random numbers have no stacked weights.
        lengths = re.findall(r"stablehlo\.while.*tensor<(\d+)x\dxf32>", lowered)
        assert [int(length) for length in lengths] == expected


@pytest.mark.parametrize("number", [4, 17])
def test_evaluation_takes_every_block_in_turn(number):
    blocks = nnx.List([Toy(0.0) for _ in range(number)])
    for i, block in enumerate(blocks):
        block.weight = nnx.Param(jnp.array([0.1 * i, 0.2, 0.0]))
    blocks.eval()
    y = jax.jit(lambda x: run_blocks(blocks, x, None, training=False, remat="none"))(jnp.ones(3))
    chex.assert_trees_all_close(y, jnp.full(3, np.prod([1.2 + 0.1 * i for i in range(number)])), rtol=1e-5)


def test_a_loop_that_starts_late_draws_the_numbers_of_its_blocks():
    blocks = nnx.List([Toy(0.5) for _ in range(6)])
    blocks.train()
    x, key, run = jnp.ones((16, 3)), jax.random.key(1), in_training("block")
    halves = jax.jit(lambda x: run(blocks[3:], run(blocks[:3], x, key), key, first=3))
    chex.assert_trees_all_close(halves(x), one_by_one(blocks, x, key), rtol=1e-6)


@pytest.mark.parametrize("kind", [vim, attention])
def test_bfloat16_stays_bfloat16_and_float32_stays_float32(kind):
    """Vim's residual stream is float32, MambaVision's is not; the rates of a loop are float32 numbers."""
    blocks = nnx.List([kind(rate, nnx.Rngs(0), jnp.bfloat16) for rate in RATES])
    blocks.train()
    for dtype in (jnp.bfloat16, jnp.float32):
        x, key = jax.ShapeDtypeStruct(TOKENS, dtype), jax.random.key(0)
        plain = jax.eval_shape(lambda x, key: one_by_one(blocks, x, key), x, key)
        looped = jax.eval_shape(lambda x, key: in_training("block")(blocks, x, key), x, key)
        assert looped == plain


def test_only_rates_above_zero_need_a_key():
    def output(*rates):
        blocks = nnx.List([Toy(rate) for rate in rates])
        blocks.train()
        return jax.jit(lambda x: run_blocks(blocks, x, None, training=True, remat="block"))(jnp.ones((1, 3)))

    chex.assert_trees_all_equal(output(0.0, 0.0, 0.0), jnp.full((1, 3), 7.0**3))
    with pytest.raises(ValueError, match="drop path with rate 0.5 in training mode needs a random key"):
        output(0.0, 0.0, 0.5)


def test_an_unknown_remat_is_refused():
    with pytest.raises(UserError, match="unknown remat 'blocks', did you mean 'block'"):
        run_blocks([], jnp.ones(3), None, training=True, remat="blocks")


def test_rematerialisation_needs_less_memory():
    def vmamba(rngs):
        mixer = SS2D(WIDTH, (Order(),), d_state=1, gate=False, conv=False, rngs=rngs)
        return Block(WIDTH, mixer, Mlp(WIDTH, 4 * WIDTH, rngs=rngs), drop_path=0.0, dtype=None, rngs=rngs)

    blocks = nnx.List([vmamba(nnx.Rngs(i)) for i in range(4)])
    blocks.train()
    graphdef, params, stats = split(blocks)

    def temporaries(remat):
        def loss(params, x):
            return in_training(remat)(merge(graphdef, params, stats), x, None).sum()

        program = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((4, 16, 16, WIDTH), jnp.float32))
        return program.compile().memory_analysis().temp_size_in_bytes

    none, dots_and_scans, block_only = map(temporaries, ("none", "dots_and_scans", "block"))
    assert block_only < 0.8 * dots_and_scans
    assert dots_and_scans < 0.5 * none
