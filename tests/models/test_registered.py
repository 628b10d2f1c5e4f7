"""What every registered model must do: at full size without computing, in small with real numbers.

What a family computes is tested against its official code in tests/weights.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax import list_models
from evmamba_jax.arrays import Arrays, merge, split
from evmamba_jax.models import abstract_model
from evmamba_jax.models.registry import VARIANTS
from evmamba_jax.training.command import parse_command

ROOT = Path(__file__).parents[2]
every_model = pytest.mark.parametrize("name", list_models())


# At full size, shapes and types only


@every_model
def test_full_size_as_its_config_builds_it(name):
    config, _ = parse_command(["train_tpu.py", "--config", str(ROOT / "configs" / f"{name}.py")])
    config.validate()
    assert config.model.name == name
    side = config.data.image_size

    options = {"drop_path_rate": config.model.drop_path_rate, **config.model.options}
    model = abstract_model(config.model.name, dtype=jnp.bfloat16, **options)
    _, params, stats = split(model)
    assert {p.dtype for p in (params | stats).values()} == {jnp.dtype(jnp.float32)}

    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    logits = jax.eval_shape(lambda model, x: model(x), model, images)
    chex.assert_shape(logits, (2, 1000))
    assert logits.dtype == jnp.bfloat16


FAMILIES = ["evmamba_t", "vmamba_t", "msvmamba_n", "vim_t", "mambavision_t"]


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_path_rises_linearly_over_all_blocks(name):
    model = abstract_model(name, drop_path_rate=0.3)
    stages = [model] if name == "vim_t" else model.stages
    rates = [block.drop_path.rate for stage in stages for block in stage.blocks]
    assert len(rates) > 9
    np.testing.assert_allclose(rates, [0.3 * i / (len(rates) - 1) for i in range(len(rates))], atol=1e-12)


# In small: few and narrow blocks


def possible_sizes(name, length, stage):
    """Return the least and the greatest side of a stage's map, for a side of the image."""
    if name.startswith("vim"):  # one resolution, patches of 16 pixels
        patches = (length - 16) // (8 if name.endswith("stride8") else 16) + 1
        return patches, patches
    stride = 4 * 2**stage
    return length // stride, -(-length // stride)  # stems and downsamplings round up or down


@every_model
def test_small_features_of_an_odd_rectangle(name):
    """Shapes and types only, as many blocks would not change them."""
    height, width = 215, 245
    model = abstract_model(name, **shrunk(name), dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps = jax.eval_shape(lambda model, x: model.features(x), model, image)
    assert len(maps) == 4
    for i, stage in enumerate(maps):
        batch, rows, columns, channels = stage.shape
        assert batch == 2
        assert rows in possible_sizes(name, height, i)
        assert columns in possible_sizes(name, width, i)
        assert channels == 16 * (1 if name.startswith("vim") else 2**i)
        # Vim's features are its residual stream, which stays float32.
        assert stage.dtype == (jnp.float32 if name.startswith("vim") else jnp.bfloat16)


class Computed(NamedTuple):
    """What a small model gave."""

    exact: jax.Array  # logits in float32
    again: jax.Array  # those of a second run
    low: jax.Array  # logits in bfloat16, in which models are trained
    gradients: Arrays  # of these
    backward: jax.stages.Traced  # the program of both


def shrunk(name):
    """Return options for few and narrow blocks and small windows, which leave the rest as it is."""
    config = VARIANTS[name].config
    small = {"width": 16, "num_classes": 10}
    if not hasattr(config, "depths"):
        small |= {"depth": 2, "image_size": 64}
    elif not hasattr(config, "window_size"):
        small |= {"depths": (0, 1, 0, 1)}  # EfficientVMamba's blocks differ between the first half and the second
    else:
        # Two blocks where the first has a scan and the second attention; windows smaller than the map.
        windows = tuple(max(2, w // 4) for w in config.window_size)
        small |= {"depths": (0, 1, 0, 2), "stem_width": 8, "window_size": windows}
    return small


def compute(name) -> Computed:
    """Run the small model forward and backward; variants that are the same in small share the run."""
    family, config, _ = VARIANTS[name]
    return _compute(family, dataclasses.replace(config, **shrunk(name)))


@functools.cache
def _compute(family, config) -> Computed:
    model = family(config, rngs=nnx.Rngs(0))
    model.eval()
    graphdef, params, stats = split(model)
    low = nnx.eval_shape(lambda: family(dataclasses.replace(config, dtype=jnp.bfloat16), rngs=nnx.Rngs(0)))
    low.eval()
    low_graphdef = split(low).graphdef
    images = jax.random.normal(jax.random.key(1), (2, 64, 48, 3))

    forward = jax.jit(lambda params, x: merge(graphdef, params, stats)(x))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, x):
        logits = merge(low_graphdef, params, stats)(x)
        return (logits.astype(jnp.float32) * jnp.arange(20.0).reshape(2, 10)).sum(), logits

    exact, again = forward(params, images), forward(params, images)
    backward = gradient.trace(params, images)
    gradients, low = gradient(params, images)
    return Computed(exact, again, low, gradients, backward)


@every_model
def test_small_forward_is_finite_and_repeats(name):
    result = compute(name)
    for logits in (result.exact, result.low):
        chex.assert_shape(logits, (2, 10))
        chex.assert_tree_all_finite(logits)
    chex.assert_trees_all_equal(result.exact, result.again)
    assert abs(result.exact[0] - result.exact[1]).max() > 1e-4  # two images, two answers


@every_model
def test_small_backward_reaches_every_parameter(name):
    """No gradient is zero: images are large enough for every map to have two tokens, and batch norms do not train."""
    gradients = compute(name).gradients
    chex.assert_tree_all_finite(gradients)
    assert [n for n, g in gradients.items() if not g.any()] == []
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(jnp.float32)}


@every_model
def test_small_bfloat16_stays_near_float32(name):
    result = compute(name)
    assert (result.exact.dtype, result.low.dtype) == (jnp.float32, jnp.bfloat16)
    exact, low = np.asarray(result.exact, np.float64), np.asarray(result.low, np.float64)
    error = np.linalg.norm(low - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.04  # above zero: it did compute in bfloat16


@pytest.mark.parametrize("name", ["evmamba_t", "vmamba_t", "msvmamba_t_v2", "vim_t", "mambavision_t"])
def test_small_lowers_for_a_tpu(name):
    """One model a family: its variants have the same parts in other sizes."""
    program = compute(name).backward.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in program  # the scans
    # Depthwise convolutions are sums of products on a CPU only.
    assert max(map(int, re.findall(r"feature_group_count = (\d+)", program))) > 1
