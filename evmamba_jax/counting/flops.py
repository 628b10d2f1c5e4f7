"""What a model costs: parameters, multiply-adds by the convention of the papers, and XLA's own count.

:func:`count_flops` reads the traced program, so that no model is allocated and none is too large. It counts, for one
image in evaluation mode and within 3 % of what the official counters give for their models:

- products of the image's values with weights, and convolutions, by their multiply-adds; of a segmenter those on the way
  to its logits, of a detector to its raw outputs;
- every selective scan as ``9 B L D N`` for the recurrence and ``B L D`` for the skip, whatever an implementation does
  instead (state-spaces/mamba issue 110). Its projections to time step, B and C are products like others;
- S5's recurrence as 4 for each token and kept state, a complex product;
- Fourier transforms of n numbers, of which S4D has two for each channel, as 5 n log2 n.

Not counted are attention's products of the image's values with each other (ptflops, the counter of MambaVision's paper,
does not see inside fused attention; :func:`flops_by_operation` has them apart), norms, activations, pooling, resizing
and sums. fvcore, the counter of EfficientVMamba, VMamba and MSVMamba, also has 5 for each element of a LayerNorm, 2 for
each of a BatchNorm, 1 for each pooled element, and 4 (bilinear) or 1 (nearest) for each resized one: 0.4 to 2.5 % of a
model. MambaVision's published figures leave out the scans (0.3 %) and have norms and activations. Vim's, printed by
other papers, hold the scan by an older convention, about 2.5 times smaller.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, Var

from evmamba_jax.counting.program import inner_programs
from evmamba_jax.layers.backbone import Backbone, Stage
from evmamba_jax.layers.s6 import S6
from evmamba_jax.models.registry import abstract_model, input_size

Size = int | tuple[int, int]


def count_parameters(model: str | nnx.Module) -> int:
    """Return the number of trained parameters of a model, given by name or as a module (abstract ones too)."""
    params = nnx.state(_abstract(model), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_flops(model: str | nnx.Module, image_size: Size | None = None) -> int:
    """Return the multiply-adds of one image in evaluation mode, by the convention of this module.

    Args:
        model: a name of :func:`evmamba_jax.list_models`, or a module, which may be abstract (``nnx.eval_shape``).
        image_size: side of a square image, or (height, width); None takes that of a name, 224 for a module.

    Raises:
        UserError: an unknown name, an image that the model does not take.

    Source: Gu, https://github.com/state-spaces/mamba/issues/110; MzeroMiko/VMamba ``selective_scan_flop_jit``.
    """
    return sum(n for operation, n in flops_by_operation(model, image_size).items() if operation != "attention")


def flops_by_operation(model: str | nnx.Module, image_size: Size | None = None) -> dict[str, int]:
    """Return multiply-adds by operation: "products", "convolutions", "scans", "transforms" and "attention", if any.

    Attention over sliding windows is counted as computed: each tile of queries with its whole halo of keys.
    """
    # An implementation that calls the recurrence as one function; a fused kernel would hide the projections too.
    program, *arguments = _program(model, image_size, "sequential")
    jaxpr = jax.make_jaxpr(program)(*arguments).jaxpr
    return dict(_count(jaxpr, [_WEIGHTS] * (len(jaxpr.invars) - 1) + [_IMAGE]))


def xla_flops(model: str | nnx.Module, image_size: Size | None = None) -> int:
    """Return what XLA counts for one image in evaluation mode, with scans as ``jax.lax.associative_scan``.

    A multiplication and an addition are two operations, so that a product counts twice as much as in
    :func:`count_flops`, and all elementwise arithmetic is counted, but no exponentials and their like. XLA counts the
    program as lowered, before it optimises, and what is inside a loop once; the associative scan has no loops, but
    does other work than the loop over tokens that a CPU runs. Nothing is compiled.

    Args:
        model: as for :func:`count_flops`.
        image_size: as for :func:`count_flops`.
    """
    program, *arguments = _program(model, image_size, "associative")
    cost: Any = jax.jit(program).lower(*arguments).cost_analysis()
    return round(cost["flops"])


def _abstract(model: str | nnx.Module) -> Any:
    """Return a module, which for a name has shapes instead of arrays."""
    return abstract_model(model) if isinstance(model, str) else model


def _program(model: str | nnx.Module, image_size: Size | None, implementation: str) -> tuple[Callable, Any, Any]:
    """Return a function from weights and one image to the model's result, and the shapes of both."""
    module = _abstract(model)
    if image_size is None:
        image_size = input_size(model) if isinstance(model, str) else 224
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    structure, weights = nnx.split(module)

    def program(weights: nnx.State, images: jax.Array) -> jax.Array:
        # A copy of the caller's module, which stays as it is.
        copy = nnx.merge(structure, weights)
        copy.eval()
        for _, part in nnx.iter_modules(copy):
            if isinstance(part, S6):
                part.implementation = implementation
            if isinstance(part, Stage | Backbone):
                part.deterministic = False  # blocks one by one: XLA counts what is inside a loop once
        return copy(images)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    channels = getattr(module, "backbone", module).in_channels  # a segmenter's or detector's are its backbone's
    return program, shapes, jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)


# What a value of the program is made from.
_CONSTANT, _WEIGHTS, _IMAGE = range(3)
_PRODUCTS = {(_WEIGHTS, _IMAGE): "products", (_IMAGE, _IMAGE): "attention"}


def _count(jaxpr: Jaxpr, sources: Sequence[int]) -> Counter[str]:
    """Return the multiply-adds of a program by operation; ``sources`` says what its arguments are made from."""
    total: Counter[str] = Counter()
    source: dict[Any, int] = dict(zip(jaxpr.invars, sources, strict=True))
    for equation in jaxpr.eqns:
        given = [source.get(x, _CONSTANT) if isinstance(x, Var) else _CONSTANT for x in equation.invars]
        source.update(dict.fromkeys(equation.outvars, max(given, default=_CONSTANT)))
        operation, params = equation.primitive.name, equation.params
        shapes: list[Any] = [getattr(x.aval, "shape", ()) for x in equation.invars]
        result = math.prod(getattr(equation.outvars[0].aval, "shape", ())) if equation.outvars else 0
        if operation == "dot_general":
            # A product with constants resizes a map; one without the image could be made once for all images.
            kind = _PRODUCTS.get((min(given), max(given)))
            (contracted, _), _ = params["dimension_numbers"]
            if kind:
                total[kind] += result * math.prod(shapes[0][axis] for axis in contracted)
        elif operation == "conv_general_dilated":
            outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total["convolutions"] += result * math.prod(shapes[1]) // outputs
        elif params.get("name") == "recurrence":  # of pallas_kernels/selective_scan.py
            (batch, length, groups, channels), states = shapes[0], shapes[2][1]
            total["scans"] += (9 * states + 1) * batch * length * groups * channels
        elif params.get("name") == "diagonal_recurrence":  # of layers/s5.py, with real and imaginary parts apart
            total["scans"] += 4 * result
        elif operation == "fft":
            lengths = params["fft_lengths"]
            if given[0] == _IMAGE:
                size = math.prod(lengths)
                total["transforms"] += math.prod(shapes[0][: -len(lengths)]) * round(5 * size * math.log2(size))
        else:
            for part, times in _parts(equation):
                # Some operations have operands of their own before those that they hand on.
                inside = _count(part, given[len(given) - len(part.invars) :])
                total.update({kind: times * n for kind, n in inside.items()})
    return total


def _parts(equation: JaxprEqn) -> list[tuple[Jaxpr, int]]:
    """Return the programs inside an equation, and how often each runs."""
    operation, params, parts = equation.primitive.name, equation.params, inner_programs(equation)
    if operation == "cond":
        # Of branches written for one platform each, the one for all others.
        return [(parts[params["branches_platforms"].index(None)], 1)]
    if operation in ("while", "pallas_call"):
        raise NotImplementedError(f"cannot count inside {operation}: how often its body runs is not in the program")
    return [(part, params["length"] if operation == "scan" else 1) for part in parts]
