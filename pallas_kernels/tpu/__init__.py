"""The scans as TPU kernels (Mosaic): what ``scan_1d.py`` and ``scan_2d.py`` call on a TPU.

Both functions become one: orders over an image with parameter sets. A sequence is an image of one column, or folded
into several, and its groups are sub-lattices. What is not the recurrence stays in XLA: the transposition that brings
images to the minor axis (free where XLA keeps activations so itself), the projection to time step, B and C, and copies
of the parameters for every lane. The gradient of all that is JAX's own; the kernels have gradients written by hand.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.geometry import Grid, Launch, Walk, grids
from pallas_kernels.tpu.kernels import LOG2E, TILE
from pallas_kernels.tpu.launch import LANES, Call, Shape, Target, plan, run

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How a batch fills lanes: ``slices`` groups of channels side by side, of ``images`` images each."""

    slices: int
    images: int

    @classmethod
    def of(cls, batch: int, channels: int) -> "Lanes":
        """Return the fullest use of 128 lanes."""
        if batch >= LANES:
            return cls(1, -(-batch // LANES) * LANES)
        fitting = [n for n in range(1, LANES // batch + 1) if channels % (n * TILE) == 0]
        return cls(max(fitting, default=1), batch)

    def fold(self, x: jax.Array) -> jax.Array:
        """Bring (..., E, B) to (..., E / slices, slices * B)."""
        x = _pad(x, x.ndim - 1, self.images)
        if self.slices == 1:
            return x
        *rest, channels, images = x.shape
        x = x.reshape(*rest, self.slices, channels // self.slices, images)
        return x.swapaxes(-3, -2).reshape(*rest, channels // self.slices, self.slices * images)

    def unfold(self, x: jax.Array, batch: int) -> jax.Array:
        """Bring (..., E / slices, slices * B) back to (..., E, B)."""
        if self.slices > 1:
            *rest, channels, _ = x.shape
            x = x.reshape(*rest, channels, self.slices, self.images)
            x = x.swapaxes(-3, -2).reshape(*rest, self.slices * channels, self.images)
        return x[..., :batch]

    def repeat(self, x: jax.Array) -> jax.Array:
        """Bring (..., B), the same for all channels, to (..., slices * B)."""
        x = _pad(x, x.ndim - 1, self.images)
        return jnp.tile(x, self.slices) if self.slices > 1 else x

    def spread(self, x: jax.Array) -> jax.Array:
        """Bring parameters (..., E) to (..., E / slices, lanes of a block)."""
        width = min(self.images, LANES)
        x = jnp.broadcast_to(x[..., None], (*x.shape, width))
        if self.slices == 1:
            return x
        *rest, channels, images = x.shape
        x = x.reshape(*rest, self.slices, channels // self.slices, images)
        return x.swapaxes(-3, -2).reshape(*rest, channels // self.slices, self.slices * images)


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    extra = size - x.shape[axis]
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


def target(interpret: Any = None) -> Target:
    """Return the machine that the program is lowered for: that of the mesh in use, or the one that is attached.

    Of a chip that nothing is known of, what all but the oldest have. ``interpret`` is for a machine without one.
    """
    try:
        info = pltpu.get_tpu_info()
    except (ValueError, RuntimeError):
        return Target(64 * 2**20, False, interpret)
    return Target(info.vmem_capacity_bytes, info.generation >= 6, interpret)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch after another over the sub-lattices of one step, with the calls that each was divided into."""

    grid: Grid
    shape: Shape
    calls: tuple[tuple[Call, ...], ...]
    target: Target

    @classmethod
    def of(cls, grid: Grid, shape: Shape, target: Target, *, gradient: bool) -> "Problem | None":
        """Plan the calls; None if some walk does not fit the target."""
        calls = [plan(launch, shape, target, gradient=gradient) for launch in grid.launches]
        return cls(grid, shape, tuple(c for c in calls if c), target) if all(calls) else None

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
    b = call.block
    blocks = weights.reshape(*weights.shape[:2], b.blocks, b.channels, b.slab)
    eye = jnp.eye(b.together, dtype=weights.dtype)
    form = jnp.einsum("lsder,tu->lsdteur", blocks, eye)
    return form.reshape(*weights.shape[:2], b.blocks, b.together * b.channels, b.together * b.slab)


def _unblocked(gradient: jax.Array, call: Call) -> jax.Array:
    """Return the gradient (lattices, sets, E, slab) from that of every pair of tokens, transposed and by image tile."""
    b = call.block
    form = gradient.sum(0).reshape(*gradient.shape[1:4], b.together, b.slab, b.together, b.channels)
    return jnp.einsum("lsdtrte->lsder", form).reshape(*gradient.shape[1:3], -1, b.slab)


def _values(inputs: dict[str, Any], i: int, call: Call) -> Arrays:
    """Return what a call of launch ``i`` reads."""
    values = inputs["image"] | inputs["launches"][i]
    if call.block.rank:
        values["weights"] = _blocked(values["weights"], call).astype(call.shape.dtype)
    if call.first:  # the skip from x to y is not for every walk
        values["skip"] = jnp.zeros_like(values["skip"])
    return values


def _forward(problem: Problem, inputs: dict[str, Any], *, final: bool = False) -> Arrays:
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
                problem.target,
                gradient=False,
            )
            y = outputs["y"]
        layers.append(y)
    return outputs | {"y": functools.reduce(jnp.add, layers)}


def _backward(problem: Problem, inputs: dict[str, Any], dy: Arrays) -> dict[str, Any]:
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
                values["kept"] = run(call, seen, ("borders",), {}, problem.target, gradient=False)["borders"]
                values.pop("start", None)
            values |= dy
            results = ["dx", *(f"d_{name}" for name in shared), "dA", "d_bias", "d_skip"]
            if call.block.rank:
                values["weights_back"] = values["weights"].swapaxes(-1, -2)
                results.append("d_weights")
            if "start" in inputs["launches"][i]:
                results.append("d_start")
            before = onto if dx is None else onto | {"dx": dx}
            outputs = run(call, values, tuple(results), before, problem.target, gradient=True)
            dx = outputs["dx"]
            onto = {name: outputs[name] for name in (f"d_{name}" for name in shared)}
            sets = slice(call.first, call.first + call.sets)
            mine = launches[i]
            mine["A"] = mine["A"].at[:, sets].add(outputs["dA"].sum(0) / LOG2E)
            mine["bias"] = mine["bias"].at[:, sets].add(outputs["d_bias"].sum(0))
            if number == 0:  # all walks of a sub-lattice see the same image and the same gradient
                mine["skip"] = outputs["d_skip"].sum(0)
            if call.block.rank:
                mine["weights"] = mine["weights"].at[:, sets].add(_unblocked(outputs["d_weights"], call))
            if "start" in mine:
                mine["start"] = outputs["d_start"]
        layers.append(dx)
    dx = functools.reduce(jnp.add, layers).astype(inputs["image"]["x"].dtype)
    image = {"x": dx} | {name: onto[f"d_{name}"] for name in shared}
    return {"image": image, "launches": launches}


# ---------------------------------------------------------------------------------------------------- over images


@dataclasses.dataclass(frozen=True)
class _Images:
    """The sizes of a call of ``scan2d``, and how they are brought into the kernels' form and back."""

    batch: int
    height: int
    width: int
    channels: int
    state: int
    rank: int
    grid: Grid
    lanes: Lanes

    @property
    def lattice(self) -> tuple[int, int]:
        """Rows and columns of a sub-lattice, padding included."""
        rows, columns = -(-self.height // self.grid.step[0]), -(-self.width // self.grid.step[1])
        if rows == 1 and columns > 256:
            # For a length that can be cut. The pixels behind the last are 0: they write nothing to a state, and what
            # they read from it is dropped.
            columns = _up(columns, 32)
        return rows, columns

    @property
    def wide(self) -> int:
        """Channels, with those that fill the last tile."""
        return _up(self.channels, TILE)

    def shape(self, dtype: Any, result: Any) -> Shape:
        """Return the shape of its launches."""
        rows, columns = self.lattice
        return Shape(
            rows=rows,
            columns=columns,
            step=self.grid.step,
            channels=self.wide // self.lanes.slices,
            images=self.lanes.slices * self.lanes.images,
            state=self.state,
            # The weights of a projection differ from slice to slice, which no product of the matrix unit can have.
            rank=self.rank if self.lanes.slices == 1 else 0,
            slots=self.grid.slots,
            softplus=True,
            dtype=dtype,
            result=result,
        )

    def image(self, x: jax.Array) -> jax.Array:
        """Bring (B, H, W, E) to (rows, step, columns, step, E, B)."""
        (rows, columns), (down, right) = self.lattice, self.grid.step
        x = _pad(_pad(_pad(x, 1, rows * down), 2, columns * right), 3, self.wide)
        return jnp.moveaxis(x.reshape(x.shape[0], rows, down, columns, right, self.wide), 0, -1)

    def back(self, x: jax.Array) -> jax.Array:
        """Bring the kernels' form back to (B, H, W, E)."""
        x = jnp.moveaxis(self.lanes.unfold(x, self.batch), -1, 0)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], x.shape[5])
        return x[:, : self.height, : self.width, : self.channels]

    def prepare(self, x, x_weight, dt_weight, dt_bias, A, D) -> dict[str, Any]:
        """Return what the kernels read."""
        f32 = jnp.float32
        x_weight = _pad(x_weight.astype(x.dtype), 1, self.wide)
        # Time steps in units of ln 2: their bias and weights here, B below.
        dt_weight = _pad(LOG2E * dt_weight.astype(f32), 2, self.wide)
        dt_bias = _pad(LOG2E * dt_bias.astype(f32), 1, self.wide)
        A, D = _pad(A.astype(f32), 1, self.wide), _pad(D.astype(f32), 1, self.wide)
        image = self.image(x)
        shape = self.shape(x.dtype, x.dtype)

        def of_lattices(parameter, row):
            """Gather (K, ...) as (step, step, slots, ...), zeros where a sub-lattice has fewer sets."""
            sets = jnp.asarray([[[*s, *[len(parameter)] * (self.grid.slots - len(s))] for s in r] for r in row])
            return jnp.concatenate([parameter, jnp.zeros_like(parameter[:1])])[sets]

        used, late = (x_weight, None) if shape.rank else (x_weight[..., self.rank :], x_weight[..., : self.rank])
        used = _pad(used, 2, shape.set_rows)
        packed = jnp.einsum(
            "hiwjeb,ijkec->hiwjkcb", image, of_lattices(used, self.grid.sets), preferred_element_type=f32
        )
        is_B = (np.arange(shape.set_rows) >= shape.rank) & (np.arange(shape.set_rows) < shape.rank + self.state)
        packed *= np.where(is_B, 1 / LOG2E, 1.0).astype(np.float32)[:, None]
        packed = packed.reshape(*packed.shape[:4], -1, packed.shape[-1])
        images = {"x": self.lanes.fold(image), "packed": self.lanes.repeat(packed)}
        if late is not None:
            low = jnp.einsum(
                "hiwjeb,ijker->hiwjkrb", image, of_lattices(late, self.grid.sets), preferred_element_type=f32
            )
            delta = jnp.einsum(
                "hiwjkrb,ijkre->hiwjkeb",
                low,
                of_lattices(dt_weight, self.grid.sets),
                precision=jax.lax.Precision.HIGHEST,
            )
            images["delta"] = self.lanes.fold(delta)
        return {
            "image": images,
            "launches": [self._parameters(part, dt_weight, dt_bias, A, D) for part in self.grid.launches],
        }

    def _parameters(self, part: Launch, dt_weight, dt_bias, A, D) -> Arrays:
        """Return the parameters of a launch, (lattices, sets, ...)."""
        numbers = jnp.asarray([self.grid.sets[i][j] for i, j in part.origins])
        visits = jnp.asarray([float(len(walk.orders)) for walk in part.walks])[:, None]  # of each pixel

        def spread(parameter):
            return _pad(self.lanes.spread(parameter[numbers]), 1, self.grid.slots)

        values = {
            "A": spread(A.swapaxes(1, 2)),
            "bias": spread(dt_bias),
            "skip": self.lanes.spread((visits * D[numbers]).sum(1)),
        }
        if self.lanes.slices == 1:
            weights = _pad(dt_weight, 1, _up(self.rank, TILE)).swapaxes(1, 2)
            values["weights"] = _pad(weights[numbers], 1, self.grid.slots)
        return values


def _problems(x, dt_weight, A, orders, target: Target, *, gradient: bool) -> list[tuple[_Images, Problem]] | str:
    """Return one problem for each step among the orders, or why there is none."""
    sorted_orders = grids(orders)
    if isinstance(sorted_orders, str):
        return f"they cannot walk {sorted_orders}"
    batch, height, width, channels = x.shape

    def planned(result) -> list[tuple[_Images, Problem]] | str:
        problems = []
        for grid in sorted_orders:
            images = _Images(
                batch,
                height,
                width,
                channels,
                A.shape[2],
                dt_weight.shape[1],
                grid,
                Lanes.of(batch, _up(channels, TILE)),
            )
            problem = Problem.of(grid, images.shape(x.dtype, result), target, gradient=gradient)
            if problem is None:
                return f"an image of {height}x{width} does not fit the chip's {target.vmem // 2**20} MiB of VMEM"
            problems.append((images, problem))
        return problems

    problems = planned(x.dtype)
    if not isinstance(problems, str) and (len(problems) > 1 or problems[0][1].layers > 1):
        problems = planned(jnp.float32)  # sums are not rounded in between
    return problems


def scan2d_unsupported(x, x_weight, dt_weight, dt_bias, A, D, *, orders) -> str | None:
    """Return why no kernel can do a call of ``scan2d`` and its gradient, or None."""
    wrong = _wrong_dtype(x, x_weight, dt_weight, dt_bias, A, D)
    if wrong:
        return wrong
    for gradient in (False, True):
        problems = _problems(x, dt_weight, A, orders, target(), gradient=gradient)
        if isinstance(problems, str):
            return problems
    return None


def _wrong_dtype(image: jax.Array, *others: jax.Array) -> str | None:
    if image.dtype not in (jnp.float32, jnp.bfloat16):
        return f"they take float32 and bfloat16, not {image.dtype}"
    return "they do not take float64" if any(x.dtype == jnp.float64 for x in others) else None


def scan2d_forward(x, x_weight, dt_weight, dt_bias, A, D, *, orders, interpret: Any = None) -> jax.Array:
    """Return y of ``scan2d``, whose arguments these are."""
    results = []
    problems = _problems(x, dt_weight, A, orders, target(interpret), gradient=False)
    assert not isinstance(problems, str), problems
    for images, problem in problems:
        y = _forward(problem, images.prepare(x, x_weight, dt_weight, dt_bias, A, D))["y"]
        results.append(images.back(y))
    return functools.reduce(jnp.add, results).astype(x.dtype)


def scan2d_backward(
    x, x_weight, dt_weight, dt_bias, A, D, dy, *, orders, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """Return the gradients of the six arrays from that of y."""
    results = []
    problems = _problems(x, dt_weight, A, orders, target(interpret), gradient=True)
    assert not isinstance(problems, str), problems
    for images, problem in problems:
        inputs, pull = jax.vjp(images.prepare, x, x_weight, dt_weight, dt_bias, A, D)
        results.append(pull(_backward(problem, inputs, {"dy": images.lanes.fold(images.image(dy))})))
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), results)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ------------------------------------------------------------------------------------------------- over sequences


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """The sizes of a call of ``selective_scan``, and how they are brought into the kernels' form and back.

    A sequence is an image of several rows, walked by rows, so that it can be cut into chunks; groups are sub-lattices.
    """

    batch: int
    length: int
    groups: int
    channels: int
    state: int
    softplus: bool
    reverse: bool
    lanes: Lanes

    @property
    def lattice(self) -> tuple[int, int]:
        """Rows and columns; together they may be more than the length."""
        columns = max(n for n in range(1, 65) if self.length % n == 0)
        if columns < 16 and self.length > 256:
            columns = 32
        return -(-self.length // columns), columns

    @property
    def biased(self) -> bool:
        """Whether the kernels get time steps with their bias added: tokens behind the last must have a step of zero."""
        return math.prod(self.lattice) > self.length and not self.softplus

    @property
    def wide(self) -> int:
        """Channels of a group, with those that fill the last tile."""
        return _up(self.channels, TILE)

    @property
    def grid(self) -> Grid:
        """All groups are walked alike."""
        walk = Walk(0, ((False, self.reverse),))
        launch = Launch(tuple((0, k) for k in range(self.groups)), (walk,))
        return Grid((1, self.groups), (tuple((k,) for k in range(self.groups)),), (launch,))

    def shape(self, dtype: Any, steps: Any) -> Shape:
        """Return the shape of the launch, for u and y of a type and time steps of another."""
        rows, columns = self.lattice
        return Shape(
            rows=rows,
            columns=columns,
            step=(1, self.groups),
            channels=self.wide // self.lanes.slices,
            images=self.lanes.slices * self.lanes.images,
            state=self.state,
            rank=0,
            slots=1,
            softplus=self.softplus,
            dtype=dtype,
            result=dtype,
            steps=jnp.float32 if self.biased else steps,
            natural=True,
        )

    def image(self, x: jax.Array) -> jax.Array:
        """Bring (B, L, K, C) to (rows, 1, columns, K, C, B)."""
        rows, columns = self.lattice
        x = _pad(x, 1, rows * columns)
        return jnp.moveaxis(x.reshape(x.shape[0], rows, 1, columns, *x.shape[2:]), 0, -1)

    def stream(self, x: jax.Array) -> jax.Array:
        """Bring (B, L, K, P) to (rows, 1, columns, K, P / slices, slices * B)."""
        return self.lanes.fold(self.image(_pad(x, 3, self.wide)))

    def back(self, x: jax.Array) -> jax.Array:
        """Bring the kernels' form of a stream back to (B, L, K, P)."""
        x = jnp.moveaxis(self.lanes.unfold(x, self.batch), -1, 0)
        x = x.reshape(x.shape[0], -1, *x.shape[4:])
        return x[:, : self.length, :, : self.channels]

    def states(self, x: jax.Array) -> jax.Array:
        """Bring states (B, K, N, P) to (K, N, P / slices, slices * B)."""
        return self.lanes.fold(jnp.moveaxis(_pad(x, 3, self.wide), 0, -1))

    def states_back(self, x: jax.Array) -> jax.Array:
        """Bring the kernels' form of states back to (B, K, N, P)."""
        return jnp.moveaxis(self.lanes.unfold(x, self.batch), -1, 0)[..., : self.channels]

    def prepare(self, u, delta, A, B, C, D, delta_bias, initial_state) -> dict[str, Any]:
        """Return what the kernels read."""
        f32 = jnp.float32
        rows, columns = self.lattice
        extra = rows * columns - self.length
        if extra:  # tokens behind the last have a time step of zero: they leave the state alone
            if self.biased:
                delta, delta_bias = delta.astype(f32) + delta_bias, jnp.zeros_like(delta_bias)
            never = -1e4 if self.softplus else 0.0
            delta = jnp.pad(delta, [(0, 0), (0, extra), (0, 0), (0, 0)], constant_values=never)
        packed = jnp.concatenate([B.astype(f32) * (1 / LOG2E), C.astype(f32)], 3)
        image = {
            "x": self.stream(u),
            "packed": self.lanes.repeat(self.image(_pad(packed, 3, _up(2 * self.state, TILE)))),
            "delta": self.stream(delta)[:, :, :, :, None],
        }

        def spread(parameter):
            return self.lanes.spread(_pad(parameter.astype(f32), parameter.ndim - 1, self.wide))

        launch = {
            "A": spread(A)[:, None],
            "bias": spread(LOG2E * delta_bias)[:, None],  # in units of ln 2
            "skip": spread(D),
            "start": self.states(initial_state),
        }
        image["packed"] = image["packed"].reshape(
            *image["packed"].shape[:3], self.groups, -1, image["packed"].shape[-1]
        )
        return {"image": image, "launches": [launch]}


def _sequences(
    u, delta, A, target: Target, *, delta_softplus: bool, reverse: bool, gradient: bool
) -> tuple[_Sequences, Problem | None]:
    batch, length, groups, channels = u.shape
    lanes = Lanes.of(batch, _up(channels, TILE))
    sequences = _Sequences(batch, length, groups, channels, A.shape[1], delta_softplus, reverse, lanes)
    return sequences, Problem.of(sequences.grid, sequences.shape(u.dtype, delta.dtype), target, gradient=gradient)


def selective_scan_unsupported(u, *others, delta_softplus, reverse) -> str | None:
    """Return why no kernel can do a call of ``selective_scan`` and its gradient, or None."""
    wrong = _wrong_dtype(u, *others)
    if wrong:
        return wrong
    for gradient in (False, True):
        options = {"delta_softplus": delta_softplus, "reverse": reverse, "gradient": gradient}
        _, problem = _sequences(u, others[0], others[1], target(), **options)
        if problem is None:
            return f"{u.shape[3]} channels with {others[1].shape[1]} states do not fit the chip's memory"
    return None


def selective_scan_forward(
    u, delta, A, B, C, D, delta_bias, initial_state, *, delta_softplus, reverse, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Return y and the last state; arrays as in ``terms.py``."""
    options = {"delta_softplus": delta_softplus, "reverse": reverse, "gradient": False}
    sequences, problem = _sequences(u, delta, A, target(interpret), **options)
    assert problem is not None
    inputs = sequences.prepare(u, delta, A, B, C, D, delta_bias, initial_state)
    outputs = _forward(problem, inputs, final=True)
    return sequences.back(outputs["y"]).astype(A.dtype), sequences.states_back(outputs["final"])


def selective_scan_backward(
    u, delta, A, B, C, D, delta_bias, initial_state, dy, d_final, *, delta_softplus, reverse, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """Return the gradients of the eight arrays."""
    options = {"delta_softplus": delta_softplus, "reverse": reverse, "gradient": True}
    sequences, problem = _sequences(u, delta, A, target(interpret), **options)
    assert problem is not None
    inputs, pull = jax.vjp(sequences.prepare, u, delta, A, B, C, D, delta_bias, initial_state)
    cotangents = {"dy": sequences.stream(dy.astype(u.dtype)), "d_final": sequences.states(d_final)}
    return pull(_backward(problem, inputs, cotangents))
