"""Arrays that take minutes to find, kept in ``$XDG_CACHE_HOME/evmamba_jax`` (``~/.cache/evmamba_jax``)."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np


def kept_arrays(
    kind: str, files: Sequence[Path], make: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Return arrays that were made from files, from the cache where the files are the same as then.

    Args:
        kind: what the arrays are, a word in the name of the file that keeps them.
        files: what they are made from; path, size and time of each are compared.
        make: makes them.

    Returns:
        The arrays by their names.
    """
    state = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "evmamba_jax" / f"{kind}-{key}.npz"
    if cache.is_file():
        with np.load(cache) as saved:
            return dict(saved)
    arrays = make()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **dict(arrays))  # pyrefly: ignore[bad-argument-type]
        partial.replace(cache)
    except OSError:
        pass  # a home that cannot be written to only costs the same work next time
    return arrays
