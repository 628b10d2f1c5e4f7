"""What every variation for experiments must do, whatever it computes, which its family's own tests say."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax import create_model
from evmamba_jax.arrays import merge, split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.models.registry import VARIANTS

VIM = {"image_size": 8, "patch_size": 4, "stride": 2, "d_state": 2}
COURSE = {"image_size": 8, "patch_size": 2, "d_state": 2, "dt_rank": 3}
CASES = {
    "vim se": ("vim_t", VIM | {"squeeze_excite": 2, "local": "separable"}),
    "vim inverted residual": ("vim_t", VIM | {"local": "inverted_residual", "local_ratio": 2}),
    "course se": ("course_vim", COURSE | {"squeeze_excite": 2}),
    "course inverted residual": ("course_vim", COURSE | {"local": "inverted_residual"}),
}
every_case = pytest.mark.parametrize("case", CASES)
SIZE, ODD = (8, 8), (11, 6)


@functools.cache
def variation(case, **more):
    """Return a family and its configuration: three equal blocks, which make a loop."""
    name, options = CASES[case]
    family, config, _ = VARIANTS[name]
    small = {"width": 8, "depth": 3, "num_classes": 5, "drop_path_rate": 0.2}
    return family, dataclasses.replace(config, **small, **options, **more)


@functools.cache
def taken_apart(case, **more):
    family, config = variation(case, **more)
    return split(family(config, rngs=nnx.Rngs(0)))


def images(height, width, count=2):
    return jax.random.normal(jax.random.key(1), (count, height, width, 3))


@jax.jit
def evaluated(model, x):
    return model(x), model.features(x)


@functools.cache
def in_evaluation(case):
    """Return logits and maps."""
    model = merge(*taken_apart(case))
    model.eval()
    return evaluated(model, images(*SIZE))


@functools.cache
def trained(case, remat, devices=1):
    """Return loss, gradients and batch statistics of a step in training mode, the images on some devices."""
    _, params, stats = taken_apart(case)
    model = merge(*taken_apart(case, remat=remat))
    model.train()
    graphdef = split(model).graphdef
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    x = jax.device_put(images(8, 8, 4), NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params, stats, x):
        model = merge(graphdef, params, stats)
        logits = model(x, key=jax.random.key(2))
        return (jax.nn.log_softmax(logits) * jnp.arange(20.0).reshape(4, 5)).mean(), split(model).batch_stats

    (loss, stats), gradients = step(params, stats, x)
    return loss, gradients, stats


@every_case
def test_logits_and_maps_of_two_sizes(case):
    _, config = variation(case)
    logits, maps = in_evaluation(case)
    chex.assert_tree_all_finite((logits, maps))
    assert abs(logits[0] - logits[1]).max() > 1e-5  # two images, two answers
    other = jax.eval_shape(evaluated, merge(*taken_apart(case)), images(*ODD))
    for size, (answer, stages) in ((SIZE, (logits, maps)), (ODD, other)):
        chex.assert_shape(answer, (2, 5))
        assert [stage.shape for stage in stages] == [(2, *config.grid_of(*size), 8)] * 4


@every_case
def test_a_loop_computes_what_the_blocks_compute(case):
    model = merge(*taken_apart(case))
    model.eval()
    model.deterministic = False  # of the backbone alone: its blocks then run one by one
    expected = evaluated(model, images(*SIZE))
    chex.assert_trees_all_close(in_evaluation(case), expected, rtol=1e-4, atol=1e-5)


@every_case
def test_a_training_step_changes_all_that_is_used(case):
    loss, gradients, stats = trained(case, "none")
    chex.assert_tree_all_finite((loss, gradients, stats))
    unused = ["cls_token"] if case.startswith("course") else []
    assert [name for name, gradient in gradients.items() if not gradient.any()] == unused
    before = taken_apart(case).batch_stats
    assert bool(stats) == case.endswith("inverted residual")
    assert [name for name, array in stats.items() if (array == before[name]).all()] == []


@every_case
def test_rematerialisation_computes_the_same(case):
    chex.assert_trees_all_close(trained(case, "block"), trained(case, "none"), rtol=2e-3, atol=2e-5)


def test_devices_share_a_batch_and_its_statistics():
    case = "vim inverted residual"
    chex.assert_trees_all_close(trained(case, "none", devices=4), trained(case, "none"), rtol=2e-3, atol=2e-5)


@every_case
def test_bfloat16_stays_near_float32(case):
    graphdef = taken_apart(case, dtype=jnp.bfloat16).graphdef
    model = merge(graphdef, *taken_apart(case)[1:])
    model.eval()
    (exact, _), (low, maps) = in_evaluation(case), evaluated(model, images(*SIZE))
    assert low.dtype == jnp.bfloat16
    assert {stage.dtype for stage in maps} == {jnp.dtype(jnp.float32)}  # the residual stream
    error = jnp.linalg.norm(low.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 0.06  # above zero: it did compute in bfloat16


@every_case
def test_saved_and_loaded_it_is_the_same(case, tmp_path):
    name, options = CASES[case]
    params, stats = (  # other than the initial ones
        {path: array + i for i, (path, array) in enumerate(part.items())} for part in taken_apart(case)[1:]
    )
    save_model(tmp_path / "saved", params=params, batch_stats=stats, meta={})
    loaded = create_model(name, width=8, depth=3, num_classes=5, **options, pretrained=tmp_path / "saved")
    chex.assert_trees_all_equal(split(loaded)[1:], (params, stats))
