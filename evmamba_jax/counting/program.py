"""The equations of traced programs, and of the programs inside them."""

from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def inner_programs(equation: JaxprEqn) -> list[Jaxpr]:
    """Return the programs that an equation runs: bodies of loops, branches, functions, kernels."""
    given = equation.params.values()
    values = [value for one in given for value in (one if isinstance(one, list | tuple) else [one])]
    programs = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in values]
    return [program for program in programs if isinstance(program, Jaxpr)]


def equations(program: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield every equation of a program, each before those inside it; Pallas kernels stay closed."""
    for equation in program.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in inner_programs(equation):
                yield from equations(inner)
