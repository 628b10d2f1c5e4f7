"""``selective_scan`` on a GPU, in the form of ``contract.py``."""

import dataclasses

import jax

from pallas_kernels.contract import LOG2E
from pallas_kernels.dispatch import Kernels
from pallas_kernels.gpu.arrays import Arrays
from pallas_kernels.gpu.call import run
from pallas_kernels.gpu.form import fill_states, sum_layers, unsupported
from pallas_kernels.gpu.program import Program, plan_program
from pallas_kernels.gpu.walks import WalkTable, sequence_table


@dataclasses.dataclass(frozen=True)
class Plan:
    """What both passes of a call of ``selective_scan`` do."""

    table: WalkTable
    forward: Program
    backward: Program


def plan(u, delta, A, *others, delta_softplus: bool, reverse: bool, interpret: bool = False) -> Plan | str:
    """Plan a call of ``selective_scan`` and its gradient; a string says why the kernels cannot do it."""
    _, length, groups, channels = u.shape
    wrong = unsupported(A.shape[1], length, interpret, u, delta, A, *others)
    if wrong:
        return wrong
    table = sequence_table(length, groups, reverse=reverse)
    sizes = {"channels": channels, "state": A.shape[1], "rank": 0, "softplus": delta_softplus}
    there, back = (plan_program(table, **sizes, gradient=gradient, interpret=interpret) for gradient in (False, True))
    return Plan(table, there, back)


def _forward(plan: Plan, arrays) -> tuple[jax.Array, jax.Array]:
    """Return y and the last state from the eight arrays, both float32."""
    u, delta, A, *others = arrays
    of = run(plan.table, plan.forward, {"x": u, **_prepare(delta, A, *others)})
    return sum_layers(of["y"]), of["final"][:, :, : A.shape[1]]


def _backward(plan: Plan, arrays, cotangents) -> tuple[jax.Array, ...]:
    """Return the gradients of the eight arrays from those of y and of the last state."""
    (u, *others), (dy, d_final) = arrays, cotangents
    inputs, pull = jax.vjp(_prepare, *others)
    of = run(plan.table, plan.backward, inputs | {"x": u, "dy": dy, "d_final": fill_states(d_final, 2)})
    gradients = {name: of[f"d_{name}"].sum(0) for name in ("A", "D", "bias", "B", "C")}
    gradients |= {"delta": of["d_delta"], "start": of["d_start"]}
    return sum_layers(of["dx"]).astype(u.dtype), *pull({n: g.astype(inputs[n].dtype) for n, g in gradients.items()})


SELECTIVE_SCAN = Kernels(plan, _forward, _backward)


def _prepare(delta, A, B, C, D, delta_bias, initial_state) -> Arrays:
    """Return what ``run`` takes beside u."""
    return {
        "delta": delta,
        "A": fill_states(A, 1) * LOG2E,
        "B": fill_states(B),
        "C": fill_states(C),
        "D": D,
        "bias": delta_bias,
        "start": fill_states(initial_state, 2),
    }
