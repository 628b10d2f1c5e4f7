"""Schedules, masks, masked AdamW, tickets and channel scores beside recorded ones. Masks are exact."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from recorded_cases import Compared, difference

from evmamba_jax import pruning
from evmamba_jax.pruning.schedules import SCHEDULES
from evmamba_jax.pruning.tickets import barrier, further

Arrays = dict[str, np.ndarray]


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every comparison of ``pruning.json`` and ``pruning.npz``."""
    about = json.loads((folder / "pruning.json").read_text())
    with np.load(folder / "pruning.npz") as file:
        arrays = dict(file)
    course = folder / "course_vim.json"
    for case, what, off, limit in (
        *schedules(about),
        *(notebook(about, json.loads(course.read_text())) if course.exists() else ()),
        *selections(about, arrays),
        *scores(arrays, x64),
        *gradual(about, arrays),
        *iterative(about, arrays),
        *adam(about, arrays, x64),
        *early_bird(about, arrays),
        *(("barrier", "barrier", abs(barrier(one["alpha"], one["loss"]) - one["barrier"]), 1e-12)
          for one in about["barrier"]),
    ):  # fmt: skip
        yield Compared(case, what, float(off), limit)


def under(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the arrays below a prefix, by the rest of their names."""
    return {name.removeprefix(f"{prefix}/"): array for name, array in arrays.items() if name.startswith(f"{prefix}/")}


def unpacked(packed: Arrays, shapes: Mapping[str, Any]) -> Arrays:
    sizes = {name: int(np.prod(shapes[name])) for name in packed}
    return {n: np.unpackbits(p)[: sizes[n]].reshape(shapes[n]).astype(bool) for n, p in packed.items()}


def differing(masks: Mapping[str, Any], wanted: Arrays) -> int:
    assert list(masks) == list(wanted)
    return sum(int((np.asarray(masks[name]) != wanted[name]).sum()) for name in wanted)


def schedules(about):
    for one in about["schedules"]:
        rule = SCHEDULES[one["kind"]](*(one[name] for name in ("initial", "final", "begin", "end")))
        name = "schedules/{kind}/{initial}/{final}/{begin}/{end}".format(**one)
        yield name, "values", max(abs(rule(t) - value) for t, value in enumerate(one["values"])), 1e-12


def notebook(about, course):
    """The zeros that the notebook's schedule leaves in the course's small model, the head at half the rate."""
    (case,) = [c for c in course["cases"].values() if c["parameters"] == 596_362][:1] or [None]
    if case is None:
        return
    rule = pruning.cosine(0.0, 0.6, 10, 70)
    for name, wanted in about["notebook_zeros"].items():
        key = next(k for k in case["state_dict"] if k == name or k.endswith(f".{name}"))
        shape = SimpleNamespace(shape=case["state_dict"][key][0])
        factors = {name: 0.5} if "output_head" in name else None
        found = [
            pruning.zeros_wanted({name: shape}, rule(min(e, 70)), factors=factors)[name] for e in range(len(wanted))
        ]
        yield f"notebook_zeros/{name}", "zeros", max(abs(a - b) for a, b in zip(found, wanted, strict=True)), 0.5


def selections(about, arrays):
    found_in = [re.fullmatch(r"(select\w*|ties)/(.*)", name) for name in about["zeros"]]
    for match in filter(None, found_in):
        name, (kind, rest) = match[0], match.groups()
        *start, scope, sparsity = rest.split("/")[:3] if kind != "ties" else ["", *rest.split("/")]
        given = under(arrays, "ties/scores" if kind == "ties" else f"scores/{start[0]}")
        shapes = {key: array.shape for key, array in given.items()}
        given = {key: jnp.asarray(array) for key, array in given.items()}
        masks = pruning.select(given, float(sparsity), scope=scope)
        if kind == "select_again":
            masks = pruning.select(given, float(rest.split("/")[3]), masks, scope=scope)
        wanted = unpacked(under(arrays, name), shapes)
        yield name, "entries of the masks", differing(masks, wanted), 0.5
        counts = {key: int((~np.asarray(mask)).sum()) for key, mask in masks.items()}
        yield name, "zeros", sum(counts[key] != count for key, count in about["zeros"][name].items()), 0.5


def scores(arrays, x64):
    weights = {name: jnp.asarray(array) for name, array in under(arrays, "weights").items()}
    steps = len({name.split("/")[0] for name in under(arrays, "gradients")})
    for name, score in pruning.SCORES.items():
        sums = score.start(weights)
        for t in range(steps):
            at, grads = ({k: jnp.asarray(v) for k, v in under(arrays, f"{w}/{t}").items()}
                         for w in ("weights_at", "gradients"))  # fmt: skip
            sums = score.accumulate(sums, at, grads)
        found = score.finished(weights, sums, jnp.asarray(steps))
        for path, wanted in under(arrays, f"scores/{name}").items():
            yield f"scores/{name}", path, difference(found[path], wanted), 1e-9 if x64 else 5e-5


def gradual(about, arrays):
    facts, shapes = about["gradual"], about["shapes"]
    times = facts["initial"], facts["final"], facts["begin"], facts["end"]
    for kind, rule in SCHEDULES.items():
        for scope in ("layer", "global"):
            factors = {"head.kernel": facts["factor of head.kernel, scope layer"]} if scope == "layer" else None
            masks = None
            for e in range(facts["updates"]):
                weights = {name: jnp.abs(array) for name, array in under(arrays, f"gradual/weights/{e}").items()}
                masks = pruning.select(weights, rule(*times)(e), masks, scope=scope, factors=factors)
                name = f"gradual/{kind}/{scope}/{e}"
                yield name, "entries of the masks", differing(masks, unpacked(under(arrays, name), shapes)), 0.5


def iterative(about, arrays):
    masks = None
    for level, alive in enumerate(about["imp"]["alive"], 1):
        weights = {name: jnp.abs(array) for name, array in under(arrays, f"gradual/weights/{level}").items()}
        masks = further(weights, about["imp"]["rate"], masks)
        yield f"imp/{level}", "alive", abs(sum(int(m.sum()) for m in masks.values()) - alive), 0.5
        wanted = unpacked(under(arrays, f"imp/{level}"), about["shapes"])
        yield f"imp/{level}", "entries of the masks", differing(masks, wanted), 0.5


def adam(about, arrays, x64):
    facts = about["adam"]
    updates = facts["updates (before the gradient of step t): sparsity"]
    curvature, centre = ({name: jnp.asarray(array) for name, array in under(arrays, f"adam/{part}").items()}
                         for part in ("curvature", "centre"))  # fmt: skip
    params = {name: jnp.asarray(array) for name, array in under(arrays, "weights").items()}
    average, masks = params, {name: jnp.ones(p.shape, bool) for name, p in params.items()}
    betas = dict(zip(("b1", "b2"), facts["betas"], strict=True))
    adamw = optax.adamw(facts["lr"], **betas, eps=facts["eps"], weight_decay=facts["weight_decay"])
    state = adamw.init(params)
    limit = 1e-9 if x64 else 5e-5
    for t in range(facts["steps"]):
        if str(t) in updates:
            magnitudes = {name: jnp.abs(p) for name, p in params.items()}
            masks = pruning.select(magnitudes, updates[str(t)], masks, scope=facts["scope"])
            params, average = pruning.apply(params, masks), pruning.apply(average, masks)
            state = pruning.mask_moments(state, masks)
            wanted = unpacked(under(arrays, f"adam/masks/{t}"), about["shapes"])
            yield f"adam/masks/{t}", "entries of the masks", differing(masks, wanted), 0.5
        grads = {name: curvature[name] * (params[name] - centre[name]) for name in params}
        changes, state = adamw.update(pruning.apply(grads, masks), state, params)
        updated = optax.apply_updates(params, changes)
        params = {name: updated[name] for name in params}
        kept = facts["ema_decay"]
        average = {name: kept * average[name] + (1 - kept) * params[name] for name in params}
        for part, found in (("params", params), ("ema", average)):
            for name, wanted in under(arrays, f"adam/{part}/{t}").items():
                yield f"adam/{part}/{t}", name, difference(found[name], wanted), limit
                dead = np.asarray(found[name])[~np.asarray(masks[name])]
                yield f"adam/{part}/{t}", f"pruned entries of {name}", np.abs(dead).max(initial=0), 1e-300


def early_bird(about, arrays):
    for one in about["early_bird"]:
        series, name = arrays[f"early_bird/{one['name']}"], f"early_bird/{one['name']}"
        rule = pruning.EarlyBird()
        state, distances, found = rule.start({"all": series[0]}), [], None
        for epoch, mask in enumerate(series):
            state = rule.update(state, {"all": jnp.asarray(mask)})
            distances.append(float(state["distances"][-1]))
            if found is None and bool(rule.found(state)):
                found = epoch
        yield name, "distances", np.abs(np.array(distances[1:]) - one["distances"]).max(), 1e-6
        yield name, f"epoch {found}, wanted {one['epoch']}", found != one["epoch"], 0.5
