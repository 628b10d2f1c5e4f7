"""``selective_scan`` as a problem for the kernels: sequences folded into images."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.geometry import Grid, Launch, Walk
from pallas_kernels.tpu.kernels import LOG2E, TILE
from pallas_kernels.tpu.launch import Shape, Target
from pallas_kernels.tpu.problem import Lanes, Problem, backward, forward, pad, target, up, wrong_dtype


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
        return up(self.channels, TILE)

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
            "packed": self.lanes.repeat(self.image(pad(packed, 3, up(2 * self.state, TILE)))),
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


def _sequences(
    u, delta, A, target: Target, *, delta_softplus: bool, reverse: bool, gradient: bool
) -> tuple[_Sequences, Problem | None]:
    batch, length, groups, channels = u.shape
    lanes = Lanes.of(batch, up(channels, TILE))
    sequences = _Sequences(batch, length, groups, channels, A.shape[1], delta_softplus, reverse, lanes)
    return sequences, Problem.of(sequences.grid, sequences.shape(u.dtype, delta.dtype), target, gradient=gradient)


def selective_scan_unsupported(u, *others, delta_softplus, reverse) -> str | None:
    """Return why no kernel can do a call of ``selective_scan`` and its gradient, or None."""
    wrong = wrong_dtype(u, *others)
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
    outputs = forward(problem, inputs, final=True)
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
    return pull(backward(problem, inputs, cotangents))
