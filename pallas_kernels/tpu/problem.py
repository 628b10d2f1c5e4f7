"""What scans over images and over sequences share: the calls of a scan, in their order, and sums of their results."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.contract import LOG2E
from pallas_kernels.tpu.blocks import Call, Shape
from pallas_kernels.tpu.call import run
from pallas_kernels.tpu.chip import Chip
from pallas_kernels.tpu.geometry import Grid
from pallas_kernels.tpu.plan import plan

Arrays = dict[str, jax.Array]


def wrong_dtype(image: jax.Array, *others: jax.Array) -> str | None:
    """Return why the kernels do not take arrays of these types, or None."""
    if image.dtype not in (jnp.float32, jnp.bfloat16):
        return f"they take float32 and bfloat16, not {image.dtype}"
    return "they do not take float64" if any(x.dtype == jnp.float64 for x in others) else None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch after another over the sub-lattices of one step, with the calls that each was divided into."""

    grid: Grid
    shape: Shape
    calls: tuple[tuple[Call, ...], ...]
    chip: Chip

    @classmethod
    def of(cls, grid: Grid, shape: Shape, chip: Chip, *, gradient: bool) -> "Problem | None":
        """Plan the calls; None if some walk does not fit the chip."""
        calls = [plan(launch, shape, chip, gradient=gradient) for launch in grid.launches]
        return cls(grid, shape, tuple(c for c in calls if c), chip) if all(calls) else None

    @property
    def layers(self) -> int:
        """Into how many results, to be added up, the largest launch was divided."""
        return max(len(calls) for calls in self.calls)

    def layer(self, number: int) -> list[tuple[int, Call]]:
        """Return the calls that write different sub-lattices of one result, each with the number of its launch."""
        return [(i, calls[number]) for i, calls in enumerate(self.calls) if number < len(calls)]

    def blank(self, number: int, like: tuple[int, ...], dtype: Any) -> jax.Array | None:
        """Return zeros for a result, or None where the layer writes all of it."""
        written = sum(len(call.origins) for _, call in self.layer(number))
        return None if written == math.prod(self.grid.step) else jnp.zeros(like, dtype)


def _blocked(weights: jax.Array, call: Call) -> jax.Array:
    """Bring weights (lattices, sets, E, slab) into the block-diagonal form that projects several tokens at once."""
    block, slab, together = call.block, call.block.maths.slab, call.block.schedule.pixels_a_product
    blocks = weights.reshape(*weights.shape[:2], block.blocks, block.channels, slab)
    eye = jnp.eye(together, dtype=weights.dtype)
    form = jnp.einsum("lsder,tu->lsdteur", blocks, eye)
    return form.reshape(*weights.shape[:2], block.blocks, together * block.channels, together * slab)


def _unblocked(gradient: jax.Array, call: Call) -> jax.Array:
    """Return the gradient (lattices, sets, E, slab) from that of every pair of tokens, transposed and by image tile."""
    block, slab, together = call.block, call.block.maths.slab, call.block.schedule.pixels_a_product
    form = gradient.sum(0).reshape(*gradient.shape[1:4], together, slab, together, block.channels)
    return jnp.einsum("lsdtrte->lsder", form).reshape(*gradient.shape[1:3], -1, slab)


def _values(inputs: dict[str, Any], i: int, call: Call) -> Arrays:
    """Return what a call of launch ``i`` reads."""
    values = inputs["image"] | inputs["launches"][i]
    if call.block.maths.rank:
        values["weights"] = _blocked(values["weights"], call).astype(call.shape.dtype)
    if call.first:  # the skip from x to y is not for every walk
        values["skip"] = jnp.zeros_like(values["skip"])
    return values


def forward(problem: Problem, inputs: dict[str, Any], *, final: bool = False) -> Arrays:
    """Return y as the kernels see images and, if asked (then there is one call), the ``final`` state."""
    layers, outputs = [], {}
    for number in range(problem.layers):
        y = problem.blank(number, inputs["image"]["x"].shape, problem.shape.result)
        for i, call in problem.layer(number):
            outputs = run(
                call,
                _values(inputs, i, call),
                ("y", "final") if final else ("y",),
                {} if y is None else {"y": y},
                problem.chip,
                gradient=False,
            )
            y = outputs["y"]
        layers.append(y)
    return outputs | {"y": functools.reduce(jnp.add, layers)}


def backward(problem: Problem, inputs: dict[str, Any], dy: Arrays) -> dict[str, Any]:
    """Return the gradients of ``inputs``, of the same structure, from those of the results, ``dy`` and ``d_final``."""
    shape = problem.shape
    shared = [name for name in ("packed", "delta") if name in inputs["image"]]
    onto = {}
    if not problem.grid.whole or any(len(s) < problem.grid.slots for row in problem.grid.sets for s in row):
        onto = {f"d_{name}": jnp.zeros_like(inputs["image"][name]) for name in shared}
    launches: list[Arrays] = [jax.tree.map(jnp.zeros_like, values) for values in inputs["launches"]]
    layers: list[Any] = []
    for number in range(problem.layers):
        dx = problem.blank(number, inputs["image"]["x"].shape, shape.result)
        for i, call in problem.layer(number):
            values = _values(inputs, i, call)
            if call.block.chunks > 1:
                seen = {name: value for name, value in values.items() if name != "skip"}
                values["kept"] = run(call, seen, ("borders",), {}, problem.chip, gradient=False)["borders"]
            values |= dy
            results = ["dx", *(f"d_{name}" for name in shared), "dA", "d_bias", "d_skip"]
            if call.block.maths.rank:
                values["weights_back"] = values["weights"].swapaxes(-1, -2)
                results.append("d_weights")
            if "start" in inputs["launches"][i]:
                results.append("d_start")
            before = onto if dx is None else onto | {"dx": dx}
            outputs = run(call, values, tuple(results), before, problem.chip, gradient=True)
            dx = outputs["dx"]
            onto = {name: outputs[name] for name in (f"d_{name}" for name in shared)}
            sets = slice(call.first, call.first + call.sets)
            mine = launches[i]
            mine["A"] = mine["A"].at[:, sets].add(outputs["dA"].sum(0) / LOG2E)
            mine["bias"] = mine["bias"].at[:, sets].add(outputs["d_bias"].sum(0))
            if number == 0:  # all walks of a sub-lattice see the same image and the same gradient
                mine["skip"] = outputs["d_skip"].sum(0)
            if call.block.maths.rank:
                mine["weights"] = mine["weights"].at[:, sets].add(_unblocked(outputs["d_weights"], call))
            if "start" in mine:
                mine["start"] = outputs["d_start"]
        layers.append(dx)
    dx = functools.reduce(jnp.add, layers).astype(inputs["image"]["x"].dtype)
    image = {"x": dx} | {name: onto[f"d_{name}"] for name in shared}
    return {"image": image, "launches": launches}
