"""``selective_scan`` as a problem for the kernels: sequences folded into images."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.contract import LOG2E
from pallas_kernels.dispatch import Kernels
from pallas_kernels.tpu.blocks import FLOAT32, Maths, Shape
from pallas_kernels.tpu.chip import SUBLANES, Chip, current_chip, round_up
from pallas_kernels.tpu.geometry import Grid, Launch, Walk
from pallas_kernels.tpu.lanes import Lanes, pad
from pallas_kernels.tpu.problem import Problem, backward, forward, wrong_dtype


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
    def lattice_shape(self) -> tuple[int, int]:
        """Rows and columns; together they may be more than the length."""
        columns = max(n for n in range(1, 65) if self.length % n == 0)
        if columns < 16 and self.length > 256:
            columns = 32
        return -(-self.length // columns), columns

    @property
    def biased(self) -> bool:
        """Whether the kernels get time steps with their bias added: tokens behind the last must have a step of zero."""
        return math.prod(self.lattice_shape) > self.length and not self.softplus

    @property
    def wide(self) -> int:
        """Channels of a group, with those that fill the last tile."""
        return round_up(self.channels, SUBLANES)

    @property
    def grid(self) -> Grid:
        """All groups are walked alike."""
        walk = Walk(0, ((False, self.reverse),))
        launch = Launch(tuple((0, k) for k in range(self.groups)), (walk,))
        return Grid((1, self.groups), (tuple((k,) for k in range(self.groups)),), (launch,))

    def shape(self, dtype: Any, steps: Any) -> Shape:
        """Return the shape of the launch, for u and y of a type and time steps of another."""
        rows, columns = self.lattice_shape
        return Shape(
            rows=rows,
            columns=columns,
            step=(1, self.groups),
            channels=self.wide // self.lanes.slices,
            images=self.lanes.slices * self.lanes.images,
            slots=1,
            maths=Maths(state=self.state, rank=0, softplus=self.softplus, natural=True, exact=dtype == FLOAT32),
            dtype=dtype,
            result=dtype,
            steps=jnp.float32 if self.biased else steps,
        )

    def image(self, x: jax.Array) -> jax.Array:
        """Bring (B, L, K, C) to (rows, 1, columns, K, C, B)."""
        rows, columns = self.lattice_shape
        x = pad(x, 1, rows * columns)
        return jnp.moveaxis(x.reshape(x.shape[0], rows, 1, columns, *x.shape[2:]), 0, -1)

    def stream(self, x: jax.Array) -> jax.Array:
        """Bring (B, L, K, P) to (rows, 1, columns, K, P / slices, slices * B)."""
        return self.lanes.fold(self.image(pad(x, 3, self.wide)))

    def back(self, x: jax.Array) -> jax.Array:
        """Bring the kernels' form of a stream back to (B, L, K, P)."""
        x = jnp.moveaxis(self.lanes.unfold(x, self.batch), -1, 0)
        x = x.reshape(x.shape[0], -1, *x.shape[4:])
        return x[:, : self.length, :, : self.channels]

    def states(self, x: jax.Array) -> jax.Array:
        """Bring states (B, K, N, P) to (K, N, P / slices, slices * B)."""
        return self.lanes.fold(jnp.moveaxis(pad(x, 3, self.wide), 0, -1))

    def states_back(self, x: jax.Array) -> jax.Array:
        """Bring the kernels' form of states back to (B, K, N, P)."""
        return jnp.moveaxis(self.lanes.unfold(x, self.batch), -1, 0)[..., : self.channels]

    def prepare(self, u, delta, A, B, C, D, delta_bias, initial_state) -> dict[str, Any]:
        """Return what the kernels read."""
        f32 = jnp.float32
        rows, columns = self.lattice_shape
        extra = rows * columns - self.length
        if extra:  # tokens behind the last have a time step of zero: they leave the state alone
            if self.biased:
                delta, delta_bias = delta.astype(f32) + delta_bias, jnp.zeros_like(delta_bias)
            never = -1e4 if self.softplus else 0.0
            delta = jnp.pad(delta, [(0, 0), (0, extra), (0, 0), (0, 0)], constant_values=never)
        packed = jnp.concatenate([B.astype(f32) * (1 / LOG2E), C.astype(f32)], 3)
        image = {
            "x": self.stream(u),
            "packed": self.lanes.repeat(self.image(pad(packed, 3, round_up(2 * self.state, SUBLANES)))),
            "delta": self.stream(delta)[:, :, :, :, None],
        }

        def spread(parameter):
            return self.lanes.spread(pad(parameter.astype(f32), parameter.ndim - 1, self.wide))

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What both passes of a call of ``selective_scan`` do."""

    sequences: _Sequences
    forward: Problem
    backward: Problem


def plan(u, delta, A, *others, delta_softplus: bool, reverse: bool, interpret: Any = None) -> Plan | str:
    """Plan a call of ``selective_scan`` and its gradient; a string says why the kernels cannot do it."""
    wrong = wrong_dtype(u, delta, A, *others)
    options = {"state": A.shape[1], "delta_softplus": delta_softplus, "reverse": reverse}
    return wrong or _plan(u.shape, u.dtype, delta.dtype, current_chip(interpret), **options)


# The forward and the backward pass are lowered one by one, and both ask for the plan.
@functools.lru_cache
def _plan(
    shape: tuple[int, ...], dtype: Any, steps: Any, chip: Chip, *, state: int, delta_softplus: bool, reverse: bool
) -> Plan | str:
    batch, length, groups, channels = shape
    lanes = Lanes.of(batch, round_up(channels, SUBLANES))
    sequences = _Sequences(batch, length, groups, channels, state, delta_softplus, reverse, lanes)
    grid, form = sequences.grid, sequences.shape(dtype, steps)
    there, back = (Problem.of(grid, form, chip, gradient=gradient) for gradient in (False, True))
    if there is None or back is None:
        return f"{channels} channels with {state} states do not fit the chip's memory"
    return Plan(sequences, there, back)


def _forward(plan: Plan, arrays) -> tuple[jax.Array, jax.Array]:
    """Return y and the last state from the eight arrays of ``contract.py``."""
    A = arrays[2]
    outputs = forward(plan.forward, plan.sequences.prepare(*arrays), final=True)
    return plan.sequences.back(outputs["y"]).astype(A.dtype), plan.sequences.states_back(outputs["final"])


def _backward(plan: Plan, arrays, cotangents) -> tuple[jax.Array, ...]:
    """Return the gradients of the eight arrays from those of y and of the last state."""
    (u, *_), (dy, d_final), sequences = arrays, cotangents, plan.sequences
    inputs, pull = jax.vjp(sequences.prepare, *arrays)
    given = {"dy": sequences.stream(dy.astype(u.dtype)), "d_final": sequences.states(d_final)}
    return pull(backward(plan.backward, inputs, given))


SELECTIVE_SCAN = Kernels(plan, _forward, _backward)
