"""Everything here that depends on Pallas for Triton: how a kernel is called, how it reads, writes and computes.

Names that changed, or may change, between releases of JAX stand in this file only.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.extend.core import Primitive

from pallas_kernels.dispatch import vary_alike

try:
    from jax._src.lib.mlir import ir
    from jax._src.pallas.triton.lowering import register_lowering
except ImportError:  # they are private; without them kernels take the registers they like, and are slower
    register_lowering = None

BlockSpec, program_id, slice_of = pl.BlockSpec, pl.program_id, pl.ds
load, store = pltriton.load, pltriton.store


def in_sight() -> bool:
    """Return whether there is a GPU to compile for: one of the mesh in use, which may only be described, or of here."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kinds = {described.platform} if described else {device.platform for device in jax.devices()}
    return bool(kinds & {"gpu", "cuda"})


class Device:
    """The few instructions that Triton does not choose by itself; an interpreted program computes the same without."""

    def __init__(self, interpret: bool):
        self.interpret = interpret

    def exp2(self, x: jax.Array) -> jax.Array:
        """Return 2**x by one instruction; Triton's own takes four, for results below 2**-126, which here become 0."""
        return jnp.exp2(x) if self.interpret else _instruction("ex2.approx.ftz.f32 $0, $1;", x)

    def reciprocal(self, x: jax.Array) -> jax.Array:
        """Return 1 / x by one instruction, to the last bit."""
        return 1 / x if self.interpret else _instruction("rcp.approx.ftz.f32 $0, $1;", x)

    def column_a_thread(self, columns: jax.Array) -> jax.Array:
        """Return column numbers as they are, such that each thread of a warp reads one of 32 columns of every row.

        Triton arranges a program's values as they are read, four neighbours to a thread if it knows that they are
        neighbours; so here it is not told.
        """
        if self.interpret:
            return columns
        return _instruction("mov.b32 $0, $1;", columns, kinds="r")

    def sums(self, x: jax.Array) -> jax.Array:
        """Return the sums of rows (N, 32), of which each thread has a column: of row i * N // 32 in thread i (32,).

        Threads trade halves of what they have left, until each has one number: N shuffles where N sums would take 5 N.
        Thread i must have column i, as ``column_a_thread`` sees to; should it not, the result is NaN.
        """
        rows, threads = x.shape
        if self.interpret:
            return jnp.repeat(x.sum(1), threads // rows)
        thread = self.column_a_thread(jnp.arange(threads))
        distance = threads
        while distance := distance // 2:
            mine = x
            if len(x) > 1:
                lower, upper = lax.split(x, (len(x) // 2,) * 2, 0)
                second = jnp.broadcast_to((thread & distance)[None] != 0, lower.shape)
                mine, x = jnp.where(second, upper, lower), jnp.where(second, lower, upper)
            x = mine + _instruction(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", x)
        check = "{.reg .pred p; .reg .u32 i; mov.u32 i, %laneid; setp.eq.u32 p, i, $2; selp.f32 $0, $1, 0f7FC00000, p;}"
        return _instruction(check, x.reshape(threads), thread, kinds="fr")

    def limited(self, x: jax.Array, registers: int | None) -> jax.Array:
        """Return x, and let a thread of this program have so many registers at most.

        The assembler takes up to 255 if it is not told, then fewer programs run at a time. Pallas has no option for
        this; Triton has.
        """
        if self.interpret or registers is None or register_lowering is None:
            return x
        return _limited.bind(x, registers=registers)

    def fma(self, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        """Return x * y + z by one instruction; XLA forbids Triton to join the two."""
        x, y, z = jnp.broadcast_arrays(x, y, z)
        return x * y + z if self.interpret else _instruction("fma.rn.f32 $0, $1, $2, $3;", x, y, z)

    def dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        """Return the product of two matrices, summed over one axis of each, to some 21 bits.

        Three products of halves, on tensor cores. In float32 proper the factors would fill the registers.
        """
        split = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return lax.dot_general(
            x,
            y,
            (((axes[0],), (axes[1],)), ((), ())),
            precision=lax.Precision.HIGHEST if self.interpret else split,
            preferred_element_type=jnp.float32,
        )

    def barrier(self) -> None:
        """Let every thread of a program see what the others have written."""
        if not self.interpret:
            pltriton.debug_barrier()


_limited = Primitive("limited_registers")
_limited.def_abstract_eval(lambda x, *, registers: x)


def _limit(context: Any, x: Any, *, registers: int) -> Any:
    """Lower ``_limited``: say so to the module that is being written."""
    module: Any = ir.InsertionPoint.current.block.owner.operation
    while module.name != "builtin.module":
        module = module.parent
    module.attributes["ttg.maxnreg"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), registers)
    return x


if register_lowering:
    register_lowering(_limited)(_limit)


def _instruction(text: str, *arguments: jax.Array, kinds: str = "f") -> jax.Array:
    """Return the result of an instruction, whose arguments are in registers of these kinds; it is like the first."""
    kinds = kinds.ljust(len(arguments), kinds[-1])
    [result] = pltriton.elementwise_inline_asm(
        text,
        args=arguments,
        constraints=",".join([f"={kinds[0]}", *kinds]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype)],
    )
    return result


def call(
    kernel: Callable,
    programs: int,
    inputs: Sequence[tuple[jax.Array, BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, BlockSpec]],
    *,
    name: str,
    flops: int,
    exponentials: int,
    aliases: dict[int, int],
    interpret: Any,
) -> list[jax.Array]:
    """Run a kernel in ``programs`` programs of one warp each.

    With one warp, sums over channels need no shared memory and there is nobody to wait for.
    """
    given = vary_alike(*(x for x, _ in inputs))  # what a kernel reads and writes varies over the same axes
    kind = jax.typeof(given[0]).manual_axis_type
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=kind) for s, _ in outputs]
    kernel.__name__ = name  # Triton names the program after the function, not after ``name``
    # JAX 0.11 and newer say so when the program is lowered, after this has returned: so the filter must stay.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=shapes,
        compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=exponentials,
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in (*given, *shapes)),
        ),
        input_output_aliases=aliases,
        interpret=interpret,
        name=name,
    )(*given)
