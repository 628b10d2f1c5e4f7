"""What each class is taken for, counted on the device, batch by batch."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from evmamba_jax.reports.per_class import Counts
from evmamba_jax.training.mesh import replicated


class Tally:
    """Counts the answers of an evaluation by class, for each variant of the model's weights.

    Nothing is fetched before the end. A variant takes 4 K^2 bytes of every device's memory.

    Args:
        mesh: on which the batches lie.
        num_classes: K.
    """

    def __init__(self, mesh: Mesh, num_classes: int):
        whole = replicated(mesh)
        square, vector = (num_classes, num_classes), (num_classes,)

        def count(counts: Counts, batch: Mapping[str, jax.Array], answers: Mapping[str, jax.Array]) -> Counts:
            # A few kB from every device to all; sums of K x K from every device would be megabytes.
            label, weight = (jax.lax.with_sharding_constraint(batch[name], whole) for name in ("label", "weight"))
            real, rank = weight > 0, answers["rank"]  # neither padding nor unreadable
            return Counts(
                counts.confusion.at[label, answers["prediction"]].add(real.astype(jnp.int32)),
                counts.top1.at[label].add((real & (rank < 1)).astype(jnp.int32)),
                counts.top5.at[label].add((real & (rank < 5)).astype(jnp.int32)),
            )

        self._count = jax.jit(count, donate_argnums=0, out_shardings=whole)
        self._zeros = jax.jit(
            lambda: Counts(*(jnp.zeros(shape, jnp.int32) for shape in (square, vector, vector))), out_shardings=whole
        )
        self._counts: dict[str, Counts] = {}

    def add(self, variant: str, batch: Mapping[str, jax.Array], answers: Mapping[str, jax.Array]) -> None:
        """Count a global batch.

        Args:
            variant: whose answers they are, "model" or "ema".
            batch: reads label and weight, each (B,).
            answers: reads prediction and rank, each (B,), as ``make_eval_step`` gives them.
        """
        if variant not in self._counts:
            self._counts[variant] = self._zeros()
        self._counts[variant] = self._count(self._counts[variant], batch, answers)

    def fetch(self) -> dict[str, Counts]:
        """Return the counts of every variant as NumPy arrays."""
        return {variant: jax.device_get(counts) for variant, counts in self._counts.items()}
