"""Dependencies point down only: train_tpu -> training -> models -> layers -> ops -> pallas_kernels."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import those to its right of itself, and what stands beside them.
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "evmamba_jax/ops.py": {"pallas_kernels"},
    "evmamba_jax/layers": {"evmamba_jax.layers", "evmamba_jax.ops", "evmamba_jax.errors", "pallas_kernels"},
    "evmamba_jax/data": {"evmamba_jax.data", "evmamba_jax.errors"},
    "evmamba_jax/models": {
        *("evmamba_jax.models", "evmamba_jax.layers", "evmamba_jax.errors", "evmamba_jax.functional"),
        *("evmamba_jax.checkpoint", "pallas_kernels"),
    },
    "evmamba_jax/analysis": {
        *("evmamba_jax.analysis", "evmamba_jax.models", "evmamba_jax.layers", "evmamba_jax.errors"),
        *("evmamba_jax.functional", "pallas_kernels"),
    },
    "evmamba_jax/weights": {
        *("evmamba_jax.weights", "evmamba_jax.models", "evmamba_jax.layers", "evmamba_jax.errors"),
        *("evmamba_jax.functional", "evmamba_jax.checkpoint"),
    },
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below(room):
    files = [ROOT / room] if room.endswith(".py") else list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            if name.split(".")[0] in ("evmamba_jax", "pallas_kernels", "configs"):
                allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[room])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_kernels_import_only_jax():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        standard = sys.stdlib_module_names
        assert roots <= standard | {"jax", "numpy", "einops", "pallas_kernels"}, f"{path.name}: {roots}"


def test_train_tpu_stays_thin():
    assert len((ROOT / "train_tpu.py").read_text().splitlines()) < 60
