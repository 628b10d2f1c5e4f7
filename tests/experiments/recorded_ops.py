"""S4D, sliding-window attention, attention pooling and squeeze-excite over tokens, as recorded in ``ops``."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from recorded_cases import Compared, difference

from evmamba_jax.arrays import Arrays, merge, split
from evmamba_jax.layers.attention_pool import AttentionPool
from evmamba_jax.layers.patches import AttentionDownsample
from evmamba_jax.layers.s4d import IMAGINARY, S4D
from evmamba_jax.layers.sliding_window import SlidingWindowAttention, sliding_window_attention
from evmamba_jax.layers.squeeze_excite import SqueezeExcite

# Zero in theory, as a softmax does not see what is added to all scores: compared as it is.
ZERO = ("key.bias",)


def limits(x64: bool) -> tuple[float, float]:
    """Return what is allowed of outputs and of gradients."""
    return (1e-9, 1e-9) if x64 else (5e-5, 5e-4)


def of_kind(arrays: Mapping[str, np.ndarray], case: str, kind: str) -> dict[str, np.ndarray]:
    """Return the arrays ``CASE/KIND/NAME`` by their names."""
    head = f"{case}/{kind}/"
    return {path.removeprefix(head): arrays[path] for path in arrays if path.startswith(head)}


def compare_case(
    case: str, arrays: Mapping[str, np.ndarray], x64: bool, outputs: Callable[[Arrays], Arrays]
) -> Iterator[Compared]:
    """Yield the differences of a case's outputs, and of the gradients of their weighted sum.

    Args:
        case: its name.
        arrays: all that was recorded.
        x64: compare in float64.
        outputs: makes the outputs, by name, from the inputs, by name.
    """
    dtype = np.float64 if x64 else np.float32
    given = {name: jnp.asarray(array, dtype) for name, array in of_kind(arrays, case, "in").items()}
    cotangents = {name: jnp.asarray(array, dtype) for name, array in of_kind(arrays, case, "cot").items()}

    @jax.jit
    def run(given, cotangents):
        results, pull = jax.vjp(lambda given: {n: y for n, y in outputs(given).items() if n in cotangents}, given)
        return results, pull(cotangents)[0]

    results, gradients = run(given, cotangents)
    for kind, ours, limit in zip(("out", "grad"), (results, gradients), limits(x64), strict=True):
        recorded = of_kind(arrays, case, kind)
        if recorded.keys() != ours.keys():
            raise ValueError(f"{case}: {kind} has {sorted(recorded)}, ours {sorted(ours)}")
        for name, wanted in recorded.items():
            yield Compared(case, f"{kind} {name}", difference(ours[name], wanted, relative=name not in ZERO), limit)


def filled(module: nnx.Module, params: Mapping[str, Any]) -> Any:
    """Return a module with these parameters, by path."""
    structure, wanted, _ = split(module)
    if {name: array.shape for name, array in wanted.items()} != {name: params[name].shape for name in params}:
        raise ValueError(f"{type(module).__name__} has {sorted(wanted)}, not {sorted(params)} in these shapes")
    return merge(structure, dict(params), {})


def linear(given: Mapping[str, jax.Array], *names: str) -> Arrays:
    """Return the parameters of linear layers, of which the recorded weights are (out, in)."""
    return {
        (path.removesuffix("weight") + "kernel" if path.endswith("weight") else path): array.T
        for path, array in given.items()
        if path.split(".")[0] in names
    }


def s4d(facts: Mapping[str, Any], given: Arrays) -> Arrays:
    """One direction."""
    u, params = given["u"], {name: array for name, array in given.items() if name != "u"}
    layer = filled(S4D(facts["channels"], d_state=facts["N"], rngs=nnx.Rngs(0)), params)
    return {"kernel": layer.kernel(facts["length"], u.dtype), "y": layer(u)}


def s4d_bidirectional(facts: Mapping[str, Any], given: Arrays) -> Arrays:
    """Two directions, with the token itself and, as the official one, from the next one on."""
    u, params = given["u"], {name: array for name, array in given.items() if name != "u"}
    both = filled(S4D(facts["channels"], d_state=facts["N"], bidirectional=True, rngs=nnx.Rngs(0)), params)(u)
    alone = {name.removeprefix("backward_"): a for name, a in params.items() if name.startswith("backward_")}
    backward = S4D(facts["channels"], d_state=facts["N"], rngs=nnx.Rngs(0))
    backward = filled(backward, {**alone, "D": jnp.zeros_like(params["D"])})(u[:, ::-1])[:, ::-1]
    later = jnp.pad(backward[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return {"y_inclusive": both, "y_exclusive": both - backward + later}


def attention(facts: Mapping[str, Any], given: Arrays) -> Arrays:
    """Sliding-window attention, the function or the module."""
    if "q" in given:
        q, k, v = (given[name] for name in "qkv")
        return {"y": sliding_window_attention(q, k, v, facts["radius"], edges=facts["edges"], tile=facts["tile"])}
    module = SlidingWindowAttention(
        facts["width"], facts["heads"], radius=facts["radius"], edges=facts["edges"], rngs=nnx.Rngs(0)
    )
    return {"y": filled(module, linear(given, "qkv", "proj"))(given["x"])}


def pool(facts: Mapping[str, Any], given: Arrays) -> Arrays:
    """Attention pooling of windows, or of the whole map."""
    if "query" in given:
        module = AttentionPool(facts["channels"], facts["heads"], rngs=nnx.Rngs(0))
        params = {"query": given["query"], **linear(given, "key", "value", "proj")}
        return {"y": filled(module, params)(given["x"])}
    window = {name: facts[name] for name in ("window", "stride", "padding")}
    module = AttentionDownsample(facts["channels"], **window, rngs=nnx.Rngs(0))
    module = filled(module, {"score": given["score"], "expand.kernel": given["expand"].T})
    return {"pooled": module.pool(given["x"]), "y": module(given["x"])}


def squeeze_excite(facts: Mapping[str, Any], given: Arrays) -> Arrays:
    """Squeeze-excite over tokens, which are the columns of a map of one row."""
    module = SqueezeExcite(facts["channels"], facts["reduction"], use_bias=facts["bias"], rngs=nnx.Rngs(0))
    return {"y": filled(module, linear(given, "reduce", "expand"))(given["x"][:, None])[:, 0]}


def cases(folder: Path, x64: bool) -> Iterator[tuple[str, Iterator[Compared]]]:
    """Yield the name of every case with what compares it."""
    arrays = dict(np.load(folder / "ops.npz"))
    for case, facts in json.loads((folder / "ops.json").read_text()).items():
        run = next(
            of
            for start, of in (("s4d", s4d), ("swa", attention), ("pool", pool), ("se_", squeeze_excite))
            if case.startswith(start)
        )
        runs = {case: (run, facts)}
        if run is s4d:
            runs[f"{case}_bidirectional"] = (s4d_bidirectional, facts)
        elif run is attention:
            # The tiles of small maps would be the whole map.
            runs = {case: (run, facts | {"tile": 8})} if "q" not in of_kind(arrays, case, "in") else {}
            tiles = {} if runs else {f" in tiles of {tile}": tile for tile in (8, 3)}
            runs |= {case + text: (run, facts | {"tile": tile}) for text, tile in tiles.items()}
        for name, (function, options) in runs.items():
            recorded = name.split(" ")[0]
            if of_kind(arrays, recorded, "in"):
                found = compare_case(
                    recorded, arrays, x64, lambda given, f=function, options=options: f(options, given)
                )
                yield recorded, (one._replace(what=one.what + name.removeprefix(recorded)) for one in found)


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    for _, found in cases(folder, x64):
        yield from found
    arrays = np.load(folder / "ops.npz")
    for path in arrays:
        if path.startswith("s4d_init/"):
            _, init, states = path.split("/")
            yield Compared(path, "A_imag", difference(IMAGINARY[init](int(states)), arrays[path]), 1e-9)
