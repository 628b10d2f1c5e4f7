"""Masks against a slow ranking, and the same masks on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax import pruning
from evmamba_jax.errors import UserError

SHAPES = {"b.kernel": (3, 8), "a.kernel": (16, 8), "c.x_proj": (2, 8, 5)}


def scores_of(seed, *, few=False, dtype=np.float32):
    """Return scores of both signs, some of them equal; ``few`` values only make ties everywhere."""
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(-2, 3, s)) if few else rng.normal
    return {name: jnp.asarray(draw(size=shape) if not few else draw(shape), dtype) for name, shape in SHAPES.items()}


def slow(scores, sparsity, masks, scope):
    """Rank by Python's sort: the dead first, then by score, of equals the later."""
    names = sorted(scores)
    groups = [names] if scope == "global" else [[name] for name in names]
    kept = {name: np.ones(scores[name].shape, bool) for name in names}
    for group in groups:
        entries = [(name, i) for name in group for i in range(scores[name].size)]
        order = {entry: k for k, entry in enumerate(entries)}
        alive = lambda entry: masks is None or bool(np.asarray(masks[entry[0]]).flat[entry[1]])  # noqa: E731
        value = lambda entry: float(np.asarray(scores[entry[0]]).flat[entry[1]])  # noqa: E731
        entries.sort(key=lambda entry: (alive(entry), value(entry) if alive(entry) else 0, -order[entry]))
        gone = max(round(sparsity * len(entries)), sum(not alive(entry) for entry in entries))
        for name, i in entries[:gone]:
            kept[name].flat[i] = False
    return kept


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("few", [False, True])
def test_selection_is_a_slow_ranking(scope, few):
    scores, masks = scores_of(0, few=few), None
    for sparsity in (0.0, 0.3, 0.1, 0.77, 1.0):  # the third asks for fewer: nothing grows back
        found = pruning.select(scores, sparsity, masks, scope=scope)
        assert list(found) == list(scores)
        wanted = slow(scores, sparsity, masks, scope)
        for name in scores:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{name} at {sparsity}")
        scores, masks = scores_of(1, few=few), found


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_masks_are_the_same_on_every_mesh(shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
    scores = scores_of(2, few=True)
    alone = pruning.select(scores, 0.6, scope="global")
    spread = {
        name: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*[None] * (array.ndim - 2), "fsdp")))
        for name, array in scores.items()
        if array.shape[-2] % shape[1] == 0
    }
    found = jax.jit(lambda s: pruning.select(s, 0.6, scope="global"))(scores | spread)
    for name in scores:
        np.testing.assert_array_equal(found[name], alone[name])


def test_factors_scale_or_spare():
    masks = pruning.select(scores_of(0), 0.5, factors={"a.*": 0.5, "c.x_proj": 0})
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert zeros == {"b.kernel": 12, "a.kernel": 32, "c.x_proj": 0}
    masks = pruning.select(scores_of(0), 0.5, scope="global", factors={"a.*": 0})
    assert masks["a.kernel"].all()
    assert sum(int((~mask).sum()) for mask in masks.values()) == 52  # half of the two others


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: pruning.select(s, 1.5), "sparsity=1.5 is not allowed: it must be a share from 0 to 1"),
        (lambda s: pruning.select(s, 0.5, scope="all"), "unknown scope 'all'"),
        (lambda s: pruning.select(s, 0.5, factors={"d.*": 1}), "'d.*', which is the path of nothing that is pruned"),
        (lambda s: pruning.select(s, 0.5, scope="global", factors={"a.*": 0.5}), "must be 0 or 1, as all arrays are"),
        (lambda s: pruning.select(s, 0.5, {"z": np.ones(3)}), "mask of z, which is no parameter here"),
        (lambda s: pruning.select(s, 0.5, s | {"b.kernel": np.ones(3)}), r"mask of b.kernel is \(3,\) and the"),
        (lambda s: pruning.cosine(0.6, 0.3, 0, 1), "initial=0.6 and final=0.3 must be shares"),
        (lambda s: pruning.cubic(0.0, 0.3, 5, 5), "begin=5 must be before end=5"),
        (lambda s: pruning.further(s, 1.0), "rate=1.0 is not allowed"),
    ],
)
def test_mistakes_get_one_line(call, message):
    with pytest.raises(UserError, match=message) as refused:
        call(scores_of(0))
    assert "\n" not in str(refused.value)


def test_what_may_be_pruned():
    params = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    others = {"a.bias": (8,), "norm.scale": (8,), "scan.A_log": (1, 8, 2), "scan.D": (1, 8), "pos_embed": (1, 4, 8)}
    assert pruning.prunable(params | {name: np.zeros(shape) for name, shape in others.items()}) == tuple(SHAPES)


def test_an_optimizer_of_ones_own_keeps_zeros():
    params = scores_of(0)
    masks = pruning.select({name: jnp.abs(p) for name, p in params.items()}, 0.5)
    params = pruning.apply(params, masks)
    tx = pruning.transformation(optax.adamw(0.1, weight_decay=0.1), masks)
    state = tx.init(params)
    params = {name: p + 1e-3 for name, p in params.items()}  # a mistake that the next update mends
    for seed in range(3):
        updates, state = tx.update(scores_of(seed), state, params)
        params = optax.apply_updates(params, updates)
        for name, mask in masks.items():
            assert not np.asarray(params[name])[~np.asarray(mask)].any()
            assert np.asarray(params[name])[np.asarray(mask)].all()


def test_the_table_counts_candidates_and_everything():
    params = {name: np.ones(shape) for name, shape in SHAPES.items()} | {"norm.scale": np.ones(48)}
    masks = {"b.kernel": np.arange(24).reshape(3, 8) % 4 > 0}
    rows = pruning.table(params, masks)
    assert [(row.path, row.shape, row.size, row.zeros, row.sparsity) for row in rows] == [
        ("b.kernel", "3x8", 24, 6, 0.25),
        ("candidates", "", 24, 6, 0.25),
        ("all", "", 24 + 128 + 80 + 48, 6, 6 / 280),
    ]
    assert pruning.sparsity(masks) == 0.25
