"""Which implementation runs: the one that the caller names, or the best one for the platform.

The platform is that of the lowered program, not of the machine that traces it. So a CPU host can compile for a TPU, and
a program for a CPU never traces a kernel. For that each operation is two JAX primitives, its forward and its backward
pass, with a lowering rule for every platform. Only the inputs are kept between the two passes, on every platform.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

logger = logging.getLogger(__name__)

# "pallas_interpret" runs the TPU kernels in Pallas's interpreter, on any platform: slow, for tests.
PALLAS = ("pallas", "pallas_interpret")

Arrays = tuple[jax.Array, ...]
P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A back end: the kernels of one operation for one platform.

    Attributes:
        plan: from the operation's arrays (shapes suffice), its options, and ``interpret`` to run the kernels without
            their platform, to what both passes need to know. A string says why the kernels cannot do this call or its
            gradient.
        forward: from a plan and the arrays to the results.
        backward: from a plan, the arrays and the gradients of the results to the gradients of the arrays.
    """

    plan: Callable[..., Any]
    forward: Callable[[Any, Arrays], Arrays]
    backward: Callable[[Any, Arrays, Arrays], Arrays]

    def passes(self, **options: Any) -> tuple[Callable[..., Arrays], Callable[[Arrays, Arrays], Arrays]]:
        """Return the two passes as functions of arrays, for whoever calls the kernels directly.

        The first goes from the arrays to the results, the second from (arrays, gradients of the results) to the
        gradients of the arrays. Both raise ValueError where the kernels cannot do the call.
        """

        def planned(arrays: Arrays) -> Any:
            plan = self.plan(*arrays, **options)
            if isinstance(plan, str):
                raise ValueError(f"no kernel can do this call: {plan}")
            return plan

        def forward(*arrays: jax.Array) -> Arrays:
            return self.forward(planned(arrays), arrays)

        def backward(arrays: Arrays, cotangents: Arrays) -> Arrays:
            return self.backward(planned(arrays), arrays, cotangents)

        return forward, backward


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation with kernels for some platforms and a portable function for all.

    Attributes:
        name: as the user knows it.
        arity: the number of its arrays.
        portable: from arrays and options to a tuple of results; differentiable.
        results: from the abstract values of the arrays to those of the results.
        kernels: the back ends, by the platform's name in JAX. Each is a function that imports its back end: Pallas
            takes 0.4 s to import, and whoever scans on a CPU does not need it.
    """

    name: str
    arity: int
    portable: Callable[..., tuple[jax.Array, ...]]
    results: Callable[..., tuple[Any, ...]]
    kernels: Mapping[str, Callable[[], Kernels]]

    def __call__(self, *arrays: jax.Array, implementation: str | None, **options: Any) -> tuple[jax.Array, ...]:
        """Run the operation; ``implementation`` is None or one of ``PALLAS``, options are hashable."""
        return _run(self, (implementation, tuple(options.items())), *vary_alike(*arrays))

    @functools.cached_property
    def forward(self) -> Primitive:
        """The primitive of the forward pass: from the arrays to the results."""
        return self._primitive("forward", self._forward, self.results)

    @functools.cached_property
    def backward(self) -> Primitive:
        """The primitive of the backward pass: from arrays and gradients of results to gradients of the arrays."""
        return self._primitive("backward", self._backward, lambda *avals: avals[: self.arity])

    def _primitive(self, direction: str, run: Callable, results: Callable) -> Primitive:
        primitive = Primitive(f"{self.name}_{direction}")
        primitive.multiple_results = True
        primitive.def_abstract_eval(lambda *avals, how: list(results(*avals)))
        primitive.def_impl(lambda *arrays, how: jax.jit(functools.partial(primitive.bind, how=how))(*arrays))
        for platform in (None, "cpu", *self.kernels):
            rule = mlir.lower_fun(functools.partial(run, platform), multiple_results=True)
            mlir.register_lowering(primitive, rule, platform=platform)
        batching.primitive_batchers[primitive] = functools.partial(_one_by_one, primitive)
        return primitive

    def _forward(self, platform: str | None, *arrays, how) -> list[jax.Array]:
        implementation, options = how
        kernels, plan = self._choose(platform, arrays, implementation, dict(options))
        results = self.portable(*arrays, **dict(options)) if kernels is None else kernels.forward(plan, arrays)
        return list(results)

    def _backward(self, platform: str | None, *arrays, how) -> list[jax.Array]:
        implementation, options = how
        arrays, cotangents = arrays[: self.arity], arrays[self.arity :]
        kernels, plan = self._choose(platform, arrays, implementation, dict(options))
        if kernels is not None:
            return list(kernels.backward(plan, arrays, cotangents))
        _, pull = jax.vjp(functools.partial(self.portable, **dict(options)), *arrays)
        return list(pull(cotangents))

    def _choose(
        self, platform: str | None, arrays, implementation: str | None, options: dict[str, Any]
    ) -> tuple[Kernels | None, Any]:
        """Return the kernels that shall run and their plan, or None for the portable function."""
        interpret = implementation == "pallas_interpret"
        back_end = self.kernels.get("tpu" if interpret else platform or "")
        if back_end:
            kernels = back_end()
            plan = kernels.plan(*arrays, **options, **({"interpret": True} if interpret else {}))
            if not isinstance(plan, str):
                logger.debug("%s%s: kernels for %s", self.name, arrays[0].shape, platform)
                return kernels, plan
            reason = plan
        else:
            reason = "there are none for this platform, only for " + " and ".join(self.kernels)
        if implementation in PALLAS:
            caller = source_info_util.summarize(source_info_util.current())
            raise ValueError(
                f"{self.name}, called at {caller}: implementation={implementation!r} asks for kernels, but {reason}; "
                "None takes a portable implementation there, as do 'sequential' and 'associative'"
            )
        logger.debug("%s%s: portable, no kernels: %s", self.name, arrays[0].shape, reason)
        return None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(operation: Operation, how, *arrays):
    return tuple(operation.forward.bind(*arrays, how=how))


def _run_fwd(operation, how, *arrays):
    return _run(operation, how, *arrays), arrays


def _run_bwd(operation, how, arrays, cotangents):
    return tuple(operation.backward.bind(*vary_alike(*arrays, *cotangents), how=how))


_run.defvjp(_run_fwd, _run_bwd)


def _one_by_one(primitive: Primitive, arrays, axes, *, how):
    """Under ``jax.vmap``, run the operation for one element after another: each has a batch of its own."""
    mapped = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True)]

    def one(_, parts):
        mine = iter(parts)
        return _, tuple(
            primitive.bind(*(x if axis is None else next(mine) for x, axis in zip(mapped, axes, strict=True)), how=how)
        )

    _, results = lax.scan(one, None, [x for x, axis in zip(mapped, axes, strict=True) if axis is not None])
    return list(results), [0] * len(results)


def vary_alike(*arrays):
    """Under ``jax.shard_map``, mark all arrays as varying over every mesh axis over which any of them varies.

    A loop must carry values of one type. The transpose of this marking also sums the gradients of shared parameters
    over the devices.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(every - own), to="varying") if every - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def sum_over(axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """Return the sum of x over the devices along axes of the mesh, inside ``jax.shard_map``; x itself without axes.

    After the sum each device uses the total differently, so the gradient must be summed too. With ``check_vma=False``
    the transpose of ``lax.psum`` already does that; with ``check_vma=True`` the marking below does.
    """
    if not axes:
        return x
    _, total = vary_alike(x, lax.psum(x, axes))
    return total


def shape_like(shape: tuple[int, ...], dtype: Any, x: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result that varies over the same mesh axes as x."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def at_callers_line(function: Callable[P, R]) -> Callable[P, R]:
    """Give all that a function traces the source line of its caller.

    JAX writes down a source line for every operation: in error messages, profiles and compiled programs. That of a scan
    is where it was asked for, not where it was dispatched.
    """
    source_info_util.register_exclusion(function.__code__.co_filename)

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with source_info_util.user_context(source_info_util.current().traceback):
            return function(*args, **kwargs)

    return traced


source_info_util.register_exclusion(__file__)
