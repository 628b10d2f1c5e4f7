"""Scans in plain JAX, for every platform: the plain reference, and the lean one that runs where no kernel does."""

from collections.abc import Callable

import jax

from pallas_kernels.portable import associative, sequential

# Each keeps the contract of contract.py. The names are those that a caller gives as ``implementation``.
PORTABLE: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "associative": associative.scan,
    "sequential": sequential.scan,
}
