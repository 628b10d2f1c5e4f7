"""A module as plain dictionaries, and back.

Training, checkpoints and weight tables all speak of parameters as one flat dictionary such as
``{"stages.0.blocks.1.norm.scale": array}``: a plain pytree that shards by path, costs nothing to flatten and reads well
in an error message. Modules are split once at the start and merged only inside a traced step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from evmamba_jax.errors import UserError

Arrays = dict[str, jax.Array]


class Split(NamedTuple):
    """A module taken apart: its structure, its trained parameters and its batch statistics."""

    graphdef: Any
    params: Arrays
    batch_stats: Arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Variables:
    """The arrays of a model without its structure: what is trained, averaged and saved."""

    params: Arrays
    batch_stats: Arrays

    def asdict(self) -> dict[str, Arrays]:
        """Return both dictionaries under their names."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def _flat(state: nnx.State) -> Arrays:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _nested(flat: Arrays, kind: type[nnx.Variable]) -> nnx.State:
    # The numbers in a path are positions in an nnx.List.
    paths = ((tuple(int(p) if p.isdigit() else p for p in name.split(".")), kind(v)) for name, v in flat.items())
    return nnx.from_flat_state(list(paths))


def split(model: nnx.Module) -> Split:
    """Take a module apart into its graph definition and two flat dictionaries of arrays."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return Split(graphdef, _flat(params), _flat(batch_stats))


def merge(graphdef: Any, params: Arrays, batch_stats: Arrays) -> Any:
    """Put a module together again. Inverse of :func:`split`; cheap inside a traced function."""
    return nnx.merge(graphdef, _nested(params, nnx.Param), _nested(batch_stats, nnx.BatchStat))


def fill(model: nnx.Module, params: Arrays, batch_stats: Arrays) -> None:
    """Replace the arrays of a module in place."""
    nnx.update(model, _nested(params, nnx.Param), _nested(batch_stats, nnx.BatchStat))


def check_same_shapes(wanted: Arrays, given: Arrays, given_name: str, wanted_name: str) -> None:
    """Raise a UserError that lists the first few names in which two dictionaries of arrays differ."""
    shapes = lambda arrays, name: tuple(arrays[name].shape) if name in arrays else "absent"  # noqa: E731
    names = [*wanted, *(name for name in given if name not in wanted)]
    differing = [name for name in names if shapes(wanted, name) != shapes(given, name)]
    if differing:
        listed = "; ".join(f"{n}: {shapes(given, n)}, expected {shapes(wanted, n)}" for n in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"{given_name} does not fit {wanted_name}: {listed}{more}")
