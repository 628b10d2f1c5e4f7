"""``create_model`` is light where it reads no weights; what it does with them is proven in ``weights/test_load.py``."""

import subprocess
import sys


def test_importing_the_library_imports_no_orbax():
    code = "import sys; from evmamba_jax import create_model; print([m for m in sys.modules if 'orbax' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
