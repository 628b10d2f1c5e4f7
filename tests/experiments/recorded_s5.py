"""S5, as recorded in ``s5``."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from recorded_cases import Compared, difference
from recorded_ops import compare_case, filled, limits, of_kind

from evmamba_jax.layers.initializers import hippo_legs
from evmamba_jax.layers.s5 import S5


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    arrays = dict(np.load(folder / "s5.npz"))
    for case, facts in json.loads((folder / "s5.json").read_text()).items():
        options = {name: facts[name] for name in ("blocks", "bidirectional", "discretization")}
        layer = S5(facts["channels"], d_state=facts["states"], **options, rngs=nnx.Rngs(0))

        def outputs(given, layer=layer):
            params = {name: array for name, array in given.items() if name != "u"}
            return {"y": filled(layer, params)(given["u"])}

        yield from compare_case(case, arrays, x64, outputs)
        for name, wanted in of_kind(arrays, case, "init").items():
            # Ours is drawn as float32.
            yield Compared(case, f"initial {name}", difference(getattr(layer, name)[...], wanted), limits(False)[0])
    for path, wanted in arrays.items():
        if path.startswith("s5_init/Lambda/"):
            ours = hippo_legs(int(path.split("/")[-1]))[0]
            yield Compared(path, "imaginary parts", difference(ours, wanted.imag), 1e-9)
            yield Compared(path, "real parts", difference(np.full(len(ours), -0.5), wanted.real), 1e-9)
