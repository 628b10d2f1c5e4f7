"""``selective_scan``: the recurrence of Mamba over sequences, channels last."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import as_arrays, axis_sizes, check_choice
from pallas_kernels.dispatch import PALLAS, Kernels, Operation, at_callers_line
from pallas_kernels.portable import PORTABLE

IMPLEMENTATIONS = (None, *PORTABLE, *PALLAS)


@at_callers_line
def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Run the selective state-space recurrence along the length of a batch of sequences.

    ``state <- exp(dt A) state + dt u B``, ``y = C . state + D u`` for every channel, with ``dt = delta + delta_bias``,
    through softplus if asked. Computed in float32, or in float64 if any argument is; inputs may be narrower.

    Args:
        u: (batch, length, channels) input.
        delta: (batch, length, channels) step size, before bias and softplus.
        A: (channels, state) continuous-time decay, negative.
        B: (batch, length, groups, state) input weights; channel d uses group d // (channels / groups).
        C: (batch, length, groups, state) output weights, grouped as B.
        D: (channels,) weight of the skip from u to y; None for no skip.
        delta_bias: (channels,) added to delta; None for zero.
        delta_softplus: pass delta + delta_bias through softplus (linear beyond 20).
        initial_state: (batch, channels, state) state before the first token; None for zero.
        return_final_state: also return the state after the last token.
        reverse: scan from the last token to the first; the final state is then that after token 0.
        implementation: None for the best one known for the platform that the program is lowered for, or its name:
            "sequential" (lean; reverse-mode gradients only) or "associative" (the plain reference; much memory).

    Returns:
        y (batch, length, channels) in the dtype of u; with ``return_final_state`` also the state (batch, channels,
        state), float32 or float64.

    Raises:
        ValueError: a shape that does not fit the arguments before it, an empty axis, an unknown implementation.
        TypeError: an argument that is no array of floating-point numbers.

    Source: Gu and Dao, Mamba, section 3; state-spaces/mamba ``selective_scan_ref``, with channels last.
    """
    name = "selective_scan"
    check_choice(name, implementation, IMPLEMENTATIONS)
    given = as_arrays(name, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, initial_state=initial_state)
    axes = {
        "u": "batch length channels",
        "delta": "batch length channels",
        "A": "channels state",
        "B": "batch length groups state",
        "C": "batch length groups state",
        "D": "channels",
        "delta_bias": "channels",
        "initial_state": "batch channels state",
    }
    sizes = axis_sizes(name, given, axes)
    batch, channels, state, groups = (sizes[axis] for axis in ("batch", "channels", "state", "groups"))
    if channels % groups:
        raise ValueError(f"{name}: B has {groups} groups, which do not divide the {channels} channels of u")
    given.setdefault("D", jnp.zeros(channels, given["A"].dtype))
    given.setdefault("delta_bias", jnp.zeros(channels, given["A"].dtype))
    # Made from u, not anew, so that it is sharded as u is.
    rest = jnp.zeros_like(given["u"][:, 0, :, None])
    given.setdefault("initial_state", jnp.broadcast_to(rest, (batch, channels, state)))
    y, final = _grouped(
        **given, groups=groups, delta_softplus=delta_softplus, reverse=reverse, implementation=implementation
    )
    return (y, final) if return_final_state else y


@functools.partial(jax.jit, static_argnames=("groups", "delta_softplus", "reverse", "implementation"))
def _grouped(u, delta, A, B, C, D, delta_bias, initial_state, *, groups, delta_softplus, reverse, implementation):
    """Bring the arguments into the grouped, channels-last form of contract.py, and the results back."""
    wide = functools.reduce(
        jnp.promote_types, (x.dtype for x in (u, delta, A, B, C, D, delta_bias, initial_state)), jnp.float32
    )

    def split(x, axis):
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    if implementation in PORTABLE:
        run = functools.partial(recurrence, run=PORTABLE[implementation])
    else:
        run = functools.partial(_OPERATION, implementation=implementation)
    y, state = run(
        split(u, 2),
        split(delta, 2),
        split(A, 0).swapaxes(1, 2).astype(wide),
        B,
        C,
        split(D, 0).astype(wide),
        split(delta_bias, 0).astype(wide),
        split(initial_state, 1).swapaxes(2, 3).astype(wide),
        delta_softplus=delta_softplus,
        reverse=reverse,
    )
    return y.reshape(u.shape).astype(u.dtype), state.swapaxes(2, 3).reshape(initial_state.shape)


@functools.partial(jax.jit, static_argnames=("run", "delta_softplus", "reverse"))
def recurrence(*arrays, run, delta_softplus, reverse):
    """Call an implementation; whoever reads a traced program finds its scans, and their shapes, by this name."""
    return run(*arrays, delta_softplus, reverse)


def _portable(*arrays, **options):
    return recurrence(*arrays, run=PORTABLE["sequential"], **options)


def _tpu() -> Kernels:
    from pallas_kernels.tpu.sequences import SELECTIVE_SCAN

    return SELECTIVE_SCAN


def _gpu() -> Kernels:
    from pallas_kernels.gpu.sequences import SELECTIVE_SCAN

    return SELECTIVE_SCAN


KERNELS = {"tpu": _tpu, "cuda": _gpu}

_OPERATION = Operation(
    name="selective_scan",
    arity=8,
    portable=_portable,
    results=lambda *avals: (avals[0].update(dtype=avals[2].dtype), avals[7]),  # y as u, in the dtype of A; the state
    kernels=KERNELS,
)
