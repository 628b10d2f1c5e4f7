"""What every test process needs before JAX starts: eight virtual CPU devices, and programs compiled once a session."""

import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# The controlling process makes the folder; the worker processes, and the commands that tests start, inherit its name.
_OWN = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_unconfigure(config):
    """Remove the folder at the end of the session."""
    if _OWN:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
