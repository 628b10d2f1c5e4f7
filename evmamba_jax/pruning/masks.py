"""Masks: which entries of which parameters are kept. A mask is data beside the parameters, under the same paths.

``True`` is kept. (``optax.masked`` means something else by the word: the leaves that a transformation looks at.) Paths
without a mask are never pruned. A model knows nothing of masks: the zeros are in its parameters.
"""

import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evmamba_jax.errors import UserError, one_of

Masks = dict[str, jax.Array]
_SCOPES = ("layer", "global")


def prunable(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of weight matrices and convolution kernels, in the order of the parameters.

    Norms, biases, ``A_log``, ``D``, embeddings and tokens are none.
    """
    return tuple(
        name
        for name, array in params.items()
        if len(array.shape) >= 2 and name.rsplit(".", 1)[-1] in ("kernel", "x_proj", "dt_proj")
    )


def zeros_wanted(
    shapes: Mapping[str, Any], sparsity: float, *, scope: str = "layer", factors: Mapping[str, float] | None = None
) -> dict[str, int] | int:
    """Return how many zeros there are to be: in each array, or with scope "global" in all together.

    Python's rounding of ``sparsity * size`` in float64, as ``torch.nn.utils.prune`` counts.

    Args:
        shapes: arrays, or whatever has a ``shape``, by path.
        sparsity: share of zeros, 0 to 1.
        scope: "layer" or "global".
        factors: of the sparsity, by patterns of paths; 0 spares an array. With scope "global" only 0 is allowed.

    Raises:
        UserError: a sparsity beyond 0 to 1; a factor that is not allowed, or a pattern that matches nothing.
    """
    one_of("scope", scope, dict.fromkeys(_SCOPES))
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity={sparsity!r} is not allowed: it must be a share from 0 to 1")
    scale = _scales(shapes, scope, factors)
    sizes = {name: math.prod(array.shape) for name, array in shapes.items()}
    if scope == "global":
        return round(sparsity * sum(size for name, size in sizes.items() if scale[name]))
    return {name: round(sparsity * scale[name] * size) for name, size in sizes.items()}


def _scales(shapes: Mapping[str, Any], scope: str, factors: Mapping[str, float] | None) -> dict[str, float]:
    """Return the factor of each array; the last pattern that matches decides."""
    scale = dict.fromkeys(shapes, 1.0)
    for pattern, factor in (factors or {}).items():
        names = fnmatch.filter(shapes, pattern)
        if not names:
            raise UserError(f"factors has {pattern!r}, which is the path of nothing that is pruned: {list(shapes)[:3]}")
        if not 0 <= factor <= 1 or (scope == "global" and factor not in (0, 1)):
            allowed = "0 or 1, as all arrays are ranked together" if scope == "global" else "from 0 to 1"
            raise UserError(f"factors[{pattern!r}]={factor!r} is not allowed: it must be {allowed}")
        scale |= dict.fromkeys(names, factor)
    return scale


def select(
    scores: Mapping[str, jax.Array],
    sparsity: float,
    masks: Mapping[str, jax.Array] | None = None,
    *,
    scope: str = "layer",
    factors: Mapping[str, float] | None = None,
) -> Masks:
    """Return masks that leave exactly the wanted number of zeros: the lowest scores go.

    What an earlier mask has pruned goes first, so nothing grows back. Among equal scores the later entry goes, in the
    order of the sorted paths, which is that of a pytree, and row by row. Pure; may be traced over scores and masks,
    which may be sharded.

    Args:
        scores: arrays by path, of any sign; float32 or float64.
        sparsity: share of zeros, 0 to 1.
        masks: the earlier ones.
        scope: "layer" ranks each array by itself, "global" all together.
        factors: as for :func:`zeros_wanted`.

    Raises:
        UserError: as :func:`zeros_wanted`; masks of other paths or shapes.
    """
    wanted = zeros_wanted(scores, sparsity, scope=scope, factors=factors)
    spared = [name for name, scale in _scales(scores, scope, factors).items() if not scale]
    ranked = {name: array for name, array in scores.items() if name not in spared}
    counts = [wanted] if isinstance(wanted, int) else [wanted[name] for name in sorted(ranked)]
    if masks is not None:
        check_masks(masks, scores)
    found = lowest(ranked, jnp.asarray(counts, jnp.int32), masks, scope=scope)
    kept = {name: jnp.ones(scores[name].shape, bool) for name in spared}
    if masks is not None:
        kept = {name: masks[name] for name in spared}
    return {name: (found | kept)[name] for name in scores}


@functools.partial(jax.jit, static_argnames="scope")
def lowest(
    scores: Mapping[str, jax.Array],
    zeros: jax.Array,
    masks: Mapping[str, jax.Array] | None = None,
    *,
    scope: str = "layer",
) -> Masks:
    """Return the masks of :func:`select` for a number of zeros that may be traced, so that one program serves all.

    Thresholds are found bit by bit: each bit is a count of what lies below, one number from every device. Nothing is
    sorted or gathered, so the answer is the same on every mesh.

    Args:
        scores: as for :func:`select`.
        zeros: int32, of each array by sorted paths (N,); with scope "global" of all together (1,).
        masks: the earlier ones.
        scope: as for :func:`select`.
    """
    names = sorted(scores)
    group = {name: 0 if scope == "global" else i for i, name in enumerate(names)}
    living = {name: jnp.ones(scores[name].shape, bool) if masks is None else masks[name] for name in names}
    keys = {name: _ordered(scores[name]) for name in names}
    word = next(iter(keys.values())).dtype
    places = _places({name: scores[name].shape for name in names})

    def count(chosen: Mapping[str, jax.Array]) -> jax.Array:
        """Return how many entries are chosen in each group (G,)."""
        sums = [jnp.sum(chosen[name], dtype=jnp.int32) for name in names]
        return jnp.stack(sums).sum(keepdims=True) if scope == "global" else jnp.stack(sums)

    def of(values: jax.Array, name: str) -> jax.Array:
        return values[group[name]]

    dead = count({name: ~living[name] for name in names})
    goes = jnp.maximum(zeros - dead, 0)  # of the living

    # The key of the last living entry to go: the largest key with fewer than `goes` below it.
    def by_key(i: jax.Array, key: jax.Array) -> jax.Array:
        tried = key | (jnp.ones((), word) << (jnp.iinfo(word).bits - 1 - i).astype(word))
        below = count({name: living[name] & (keys[name] < of(tried, name)) for name in names})
        return jnp.where(below < goes, tried, key)

    key = jax.lax.fori_loop(0, jnp.iinfo(word).bits, by_key, jnp.zeros(goes.shape, word))
    ties = {name: living[name] & (keys[name] == of(key, name)) for name in names}
    more = goes - count({name: living[name] & (keys[name] < of(key, name)) for name in names})

    # Of the entries with just this key the last `more` go: those from a place on, found the same way.
    def by_place(i: jax.Array, place: jax.Array) -> jax.Array:
        tried = place | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        from_there = count({name: ties[name] & (places[name] >= of(tried, name)) for name in names})
        return jnp.where(from_there > more, tried, place)

    place = jax.lax.fori_loop(0, 32, by_place, jnp.zeros(goes.shape, jnp.uint32))
    place = jnp.where(count(ties) > more, place + 1, 0)
    return {
        name: living[name] & (keys[name] >= of(key, name)) & ~(ties[name] & (places[name] >= of(place, name)))
        for name in names
    }


def _ordered(scores: jax.Array) -> jax.Array:
    """Return unsigned integers in the order of floating-point numbers; -0 and 0 are one."""
    word = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    scores = scores if scores.dtype == jnp.float64 else scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), word)
    top = jnp.ones((), word) << (jnp.iinfo(word).bits - 1)
    return jnp.where(bits >= top, ~bits, bits | top)


def _places(shapes: Mapping[str, Sequence[int]]) -> dict[str, jax.Array]:
    """Return the position of every entry among those of all arrays, row by row."""
    first, places = 0, {}
    for name, shape in shapes.items():
        place = jnp.full(shape, first, jnp.uint32)
        for axis in range(len(shape)):
            step = math.prod(shape[axis + 1 :])
            place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
        places[name] = place
        first += math.prod(shape)
    return places


def check_masks(masks: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Raise a UserError where masks are not of these arrays."""
    for name, mask in masks.items():
        if name not in arrays:
            raise UserError(f"there is a mask of {name}, which is no parameter here: the masks are of another model")
        if tuple(mask.shape) != tuple(arrays[name].shape):
            raise UserError(
                f"the mask of {name} is {tuple(mask.shape)} and the parameter {tuple(arrays[name].shape)}: the masks "
                "are of another model"
            )


def apply(arrays: Mapping[str, jax.Array], masks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return arrays with zeros where a mask is False; those without a mask pass."""
    return {
        name: jnp.where(masks[name], array, jnp.zeros((), array.dtype)) if name in masks else array
        for name, array in arrays.items()
    }


def transformation(
    tx: optax.GradientTransformation, masks: Mapping[str, jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer for a loop of one's own that keeps what is pruned at exactly zero.

    Gradients are masked before ``tx`` sees them, and the update of a pruned entry is minus the entry.
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        if params is None:
            raise UserError("pruning.transformation needs the parameters: tx.update(gradients, state, params)")
        result: Any = inner.update(apply(updates, masks), state, params, **more)
        moved, state = result
        return moved | {name: jnp.where(mask, moved[name], -params[name]) for name, mask in masks.items()}, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def sparsity(masks: Mapping[str, Any]) -> float:
    """Return the share of zeros in all masks together."""
    size = sum(math.prod(mask.shape) for mask in masks.values())
    return sum(int(np.sum(~np.asarray(mask))) for mask in masks.values()) / size if size else 0.0


class Row(NamedTuple):
    """A line of ``sparsity.csv``."""

    path: str
    shape: str
    size: int
    zeros: int
    sparsity: float


def table(params: Mapping[str, Any], masks: Mapping[str, Any]) -> list[Row]:
    """Return a row for each mask, then the totals of the candidates and of all parameters, pruned or not."""
    check_masks(masks, params)

    def row(path: str, shape: str, size: int, zeros: int) -> Row:
        return Row(path, shape, size, zeros, zeros / size if size else 0.0)

    rows = [
        row(name, "x".join(map(str, mask.shape)), math.prod(mask.shape), int(np.sum(~np.asarray(mask))))
        for name, mask in masks.items()
    ]
    zeros = sum(row.zeros for row in rows)
    everything = sum(math.prod(array.shape) for array in params.values())
    return [*rows, row("candidates", "", sum(row.size for row in rows), zeros), row("all", "", everything, zeros)]


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> jax.Array:
    """Return in what share of their entries two sets of masks differ, a scalar of float32.

    Source: the normalised Hamming distance of You et al., Drawing early-bird tickets (arXiv:1909.11957).
    """
    check_masks(a, b)
    size = sum(math.prod(mask.shape) for mask in a.values())
    differing = sum(jnp.sum(jnp.asarray(a[name]) != jnp.asarray(b[name]), dtype=jnp.int32) for name in a)
    return jnp.asarray(differing, jnp.float32) / size


def mask_moments(opt_state: Any, masks: Mapping[str, jax.Array]) -> Any:
    """Return an optimizer's state with its moments masked: dictionaries in it whose keys are parameters' paths."""

    def is_keyed(node: Any) -> bool:
        return isinstance(node, dict) and any(name in node for name in masks)

    return jax.tree.map(lambda node: apply(node, masks) if is_keyed(node) else node, opt_state, is_leaf=is_keyed)
