"""Results and gradients of the GPU kernels against loops in float64: on the GPU at hand, or without one.

    python tests/kernels/compare_gpu.py                  # on this GPU
    python tests/kernels/compare_gpu.py --interpret      # by Pallas's interpreter, on any machine
    python tests/kernels/compare_gpu.py --ptx h200       # the PTX that XLA makes of them, interpreted: minutes

Differences are told as they are found; last comes a line of JSON, the worst. The PTX takes JAX 0.10.2 and
``pip install -e ".[preflight-cuda]"``.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import scan_oracle
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from evmamba_jax.preflight.gpu import GPUS, kernel_ptx
from pallas_kernels import ATROUS, CROSS, Order, gpu
from pallas_kernels.gpu import call, triton

BOTH = (Order(), Order(reverse=True))
ARGUMENTS = ("x", "x_weight", "dt_weight", "dt_bias", "A", "D")


class Case(NamedTuple):
    """A small call of a kernel.

    Attributes:
        name: of the scan.
        function: the forward or the backward pass.
        arrays: its arguments.
        wanted: by their names the results, in float64.
    """

    name: str
    function: Callable[..., Any]
    arrays: Sequence[Any]
    wanted: dict[str, np.ndarray]


class Difference(NamedTuple):
    """How far a result is from the loop's.

    Attributes:
        name: of the scan.
        what: result or gradient.
        error: largest difference, as a share of the largest value.
        limit: what the error must stay below.
    """

    name: str
    what: str
    error: float
    limit: float

    @property
    def wrong(self) -> bool:
        """Whether the result is too far off; NaN is."""
        return not self.error < self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.what} differs by {self.error:.1e} of its maximum"


def cases(interpret: bool = False) -> Iterator[Case]:
    """Yield both passes of ``scan2d`` for five sets of orders and types, then of two ``selective_scan``."""
    for name, orders, state, rank, dtype in (
        ("atrous", ATROUS, 16, 3, jnp.float32),
        ("cross", CROSS, 1, 17, jnp.float32),
        ("both", BOTH, 4, 2, jnp.float32),
        ("cross, bfloat16", CROSS, 1, 6, jnp.bfloat16),
        ("atrous, bfloat16", ATROUS, 16, 3, jnp.bfloat16),
    ):
        problem = scan_oracle.make_scan2d(0, height=5, width=6, orders=len(orders), state=state, rank=rank, channels=64)
        arrays = [jnp.asarray(problem[argument], jnp.float32) for argument in ARGUMENTS]
        arrays[0] = arrays[0].astype(dtype)
        problem["x"] = np.asarray(arrays[0], np.float64)
        dy = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), dtype)
        indices = [order.indices(5, 6) for order in orders]
        y, gradients = scan_oracle.scan2d(problem, indices, np.asarray(dy, np.float64))
        forward, backward = gpu.SCAN2D.passes(orders=orders, interpret=interpret)
        yield Case(name, forward, arrays, {"y": y})
        yield Case(name, backward, [tuple(arrays), (dy,)], {argument: gradients[argument] for argument in ARGUMENTS})

    for name, state, share in (("selective_scan", 8, 40), ("selective_scan, two channels a thread", 1, 64)):
        problem = scan_oracle.make_scan(
            2, length=21, state=state, groups=2, share=share, optional=("D", "delta_bias", "initial_state")
        )
        dy, d_final = (np.random.default_rng(3).normal(size=problem[of].shape) for of in ("u", "initial_state"))
        y, final, gradients = scan_oracle.scan(problem, softplus_delta=True, reverse=True, dy=dy, d_state=d_final)
        forward, backward = gpu.SELECTIVE_SCAN.passes(delta_softplus=True, reverse=True, interpret=interpret)
        forms = dict.fromkeys(("u", "delta", "y"), lambda x: x.reshape(*x.shape[:2], 2, -1))
        forms |= dict.fromkeys(
            ("initial_state", "final"), lambda x, n=state: x.reshape(x.shape[0], 2, -1, n).swapaxes(2, 3)
        )
        forms |= {"A": lambda x, n=state: x.reshape(2, -1, n).swapaxes(1, 2)} | dict.fromkeys("BC", lambda x: x)
        forms |= dict.fromkeys(("D", "delta_bias"), lambda x: x.reshape(2, -1))
        names = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
        arrays = [jnp.asarray(forms[of](problem[of]), jnp.float32) for of in names]
        cotangents = [jnp.asarray(forms[of](x), jnp.float32) for of, x in (("y", dy), ("final", d_final))]
        results = {"y": forms["y"](y), "last state": forms["final"](final)}
        yield Case(name, forward, arrays, results)
        backwards = {of: forms[of](gradients[of]) for of in names}
        yield Case(name, backward, [tuple(arrays), tuple(cotangents)], backwards)


def compiled(chosen: Sequence[Case], options: dict[str, bool]) -> list[Callable[..., Any]]:
    """Compile the functions of cases beside one another."""
    with jax.default_matmul_precision("highest"):  # else XLA's own products are in TF32
        lowered = [jax.jit(case.function).lower(*case.arrays) for case in chosen]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda program: program.compile(compiler_options=options), lowered))


def compare(chosen: Sequence[Case], functions: Sequence[Callable[..., Any]]) -> list[Difference]:
    """Print how far every result of cases is off, and return all; functions are the cases' own, or what runs them."""
    found = []
    for case, function in zip(chosen, functions, strict=True):
        results = jax.tree.leaves(function(*case.arrays))
        for (what, exact), one in zip(case.wanted.items(), results, strict=True):
            error = np.abs(np.asarray(one, np.float64) - exact).max() / np.abs(exact).max()
            limit = 4e-3 if one.dtype == jnp.bfloat16 else 1e-5
            found.append(Difference(case.name, what, float(error), limit))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def summary(found: Sequence[Difference]) -> dict[str, Any]:
    """Return the largest error over its limit, and the result it is in; or what is wrong."""
    wrong = [str(difference) for difference in found if difference.wrong]
    worst = max(found, key=lambda difference: difference.error / difference.limit)
    named = {"worst": worst.error / worst.limit, "of": f"{worst.name}, {worst.what}"}
    return {"wrong": "; ".join(wrong)} if wrong else named


def emulated(kind):
    """Return what stands in for ``triton.call``: it compiles a kernel for a GPU and interprets its PTX."""

    def emulate(kernel, programs, inputs, outputs, **rest):
        def again(*arrays):
            specified = [(array, spec) for array, (_, spec) in zip(arrays, inputs, strict=True)]
            return triton.call(kernel, programs, specified, outputs, **rest)

        arrays = [np.asarray(array) for array, _ in inputs]
        program = ptx.Program(kernel_ptx(again, kind, arrays))
        results = program.run(arrays, [(s.shape, s.dtype) for s, _ in outputs], rest["aliases"], programs)
        return list(map(jnp.asarray, results))

    return emulate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--interpret", action="store_true", help="by Pallas's interpreter, on any machine")
    where.add_argument("--ptx", metavar="GPU", choices=GPUS, help=f"interpret the PTX for one of {', '.join(GPUS)}")
    parser.add_argument("--only", metavar="SCAN", help="of all passes only the first of this scan, e.g. both")
    options = parser.parse_args()
    chosen = [*cases(options.interpret)]
    names = list(dict.fromkeys(case.name for case in chosen))
    if options.only and options.only not in names:
        parser.error(f"--only {options.only}: there is no such scan; there are {'; '.join(names)}")
    if options.only:
        chosen = [case for case in chosen if case.name == options.only][:1]
    if options.ptx:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # before the plugin looks for a GPU
        jax.config.update("jax_platforms", "cpu")
        call.call = emulated(options.ptx)
        device = AbstractDevice(device_kind=GPUS[options.ptx][0], num_cores=None, platform="gpu")
        with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            found = compare(chosen, [case.function for case in chosen])
    else:
        # An interpreted kernel is a large program of small steps that runs once.
        quick = {"xla_llvm_disable_expensive_passes": True} if options.interpret else {}
        found = compare(chosen, compiled(chosen, quick))
    facts = summary(found)
    print(json.dumps(facts))
    sys.exit("wrong" in facts)


if __name__ == "__main__":
    main()
