"""Which implementation runs: a name that the caller gives, or the best one for the platform the program is lowered for.

The choice between platforms falls when a program is lowered, not when it is traced, so that a CPU host can compile for
a TPU, and a program for a CPU never traces a kernel. For that each operation is two JAX primitives, its forward and its
backward pass, with a lowering rule for every platform. What is kept between the two passes is the inputs alone, on
every platform.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

logger = logging.getLogger(__name__)

# Platforms with kernels, as JAX names them, and the modules of these. A module has, for every operation, NAME_forward
# and NAME_backward, which take the operation's arrays (and cotangents) and options, and NAME_unsupported, which takes
# the same arrays and options and returns why the kernels cannot do this, or None.
KERNELS = {"tpu": "pallas_kernels.tpu", "cuda": "pallas_kernels.gpu"}

# "pallas_interpret" runs the TPU kernels in Pallas's interpreter, on any platform: slow, for tests.
PALLAS = ("pallas", "pallas_interpret")


class Operation:
    """An operation with kernels for some platforms and a portable function for all.

    Args:
        name: as the user and the kernels' modules know it.
        arity: the number of its arrays.
        portable: from arrays and options to a tuple of results; differentiable.
        results: from the abstract values of the arrays to those of the results.
    """

    def __init__(
        self,
        name: str,
        arity: int,
        portable: Callable[..., tuple[jax.Array, ...]],
        results: Callable[..., tuple[Any, ...]],
    ):
        self.name = name
        self.arity = arity
        self.portable = portable
        self.results = results
        self.forward = self._primitive("forward", self._forward)
        self.backward = self._primitive("backward", self._backward)

    def __call__(self, *arrays: jax.Array, implementation: str | None, **options: Any) -> tuple[jax.Array, ...]:
        """Run the operation; ``implementation`` is None or one of ``PALLAS``, options are hashable."""
        return _run(self, (implementation, tuple(options.items())), *vary_alike(*arrays))

    def _primitive(self, direction: str, run: Callable) -> Primitive:
        primitive = Primitive(f"{self.name}_{direction}")
        primitive.multiple_results = True

        def abstract(*arrays, how):
            return list(self.results(*arrays)) if direction == "forward" else list(arrays[: self.arity])

        primitive.def_abstract_eval(abstract)
        primitive.def_impl(lambda *arrays, how: jax.jit(functools.partial(primitive.bind, how=how))(*arrays))
        for platform in (None, "cpu", *KERNELS):
            rule = mlir.lower_fun(functools.partial(run, platform), multiple_results=True)
            mlir.register_lowering(primitive, rule, platform=platform)
        batching.primitive_batchers[primitive] = functools.partial(_one_by_one, primitive)
        return primitive

    def _forward(self, platform: str | None, *arrays, how) -> list[jax.Array]:
        implementation, options = how
        kernels, more = self._kernels(platform, arrays, implementation, dict(options))
        if kernels is None:
            results = self.portable(*arrays, **dict(options))
        else:
            results = getattr(kernels, f"{self.name}_forward")(*arrays, **dict(options), **more)
        return jax.tree.leaves(results)

    def _backward(self, platform: str | None, *arrays, how) -> list[jax.Array]:
        implementation, options = how
        arrays, cotangents = arrays[: self.arity], arrays[self.arity :]
        kernels, more = self._kernels(platform, arrays, implementation, dict(options))
        if kernels is None:
            _, pull = jax.vjp(functools.partial(self.portable, **dict(options)), *arrays)
            return list(pull(cotangents))
        return list(getattr(kernels, f"{self.name}_backward")(*arrays, *cotangents, **dict(options), **more))

    def _kernels(self, platform: str | None, arrays, implementation: str | None, options: dict[str, Any]):
        """Return the module of the kernels that shall run, or None for the portable function, and more options."""
        interpret = implementation == "pallas_interpret"
        if interpret:
            platform = "tpu"
        if platform in KERNELS:
            kernels = importlib.import_module(KERNELS[platform])
            reason = getattr(kernels, f"{self.name}_unsupported")(*arrays, **options)
            if reason is None:
                logger.debug("%s%s: kernels for %s", self.name, arrays[0].shape, platform)
                return kernels, {"interpret": True} if interpret else {}
        else:
            reason = "there are none for this platform, only for " + " and ".join(KERNELS)
        if implementation in PALLAS:
            raise ValueError(
                f"{self.name}: implementation={implementation!r} asks for kernels, but {reason}; "
                "None takes a portable implementation there, as do 'sequential' and 'associative'"
            )
        logger.debug("%s%s: portable, no kernels: %s", self.name, arrays[0].shape, reason)
        return None, {}


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

    A loop must carry values of one type, and the gradients of shared parameters then get their sum over devices from
    the transpose of this marking.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(every - own), to="varying") if every - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def sum_over(axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """Return the sum of x over the devices along axes of the mesh, inside ``jax.shard_map``; x itself without axes.

    Every device goes on with the sum in its own way, so that its gradient, too, is to be summed over them. Without
    JAX's check of what varies that is how ``lax.psum`` is transposed; with it, this marking is.
    """
    if not axes:
        return x
    _, total = vary_alike(x, lax.psum(x, axes))
    return total


def shape_like(shape: tuple[int, ...], dtype: Any, x: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result that varies over the same mesh axes as x."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
