"""Imports point down only, and every room has a row that says what it may import."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a room may import the rooms named in its row, all of which stand in rows above it.
# Files and folders of evmamba_jax go by their own name; "evmamba_jax" is its __init__.py.
ROWS = {
    "pallas_kernels.contract": "",
    "pallas_kernels.apart": "",
    "pallas_kernels.arguments": "",
    "pallas_kernels.orders": "",
    "pallas_kernels.dispatch": "",
    "pallas_kernels.portable": "pallas_kernels.contract pallas_kernels.dispatch",
    "pallas_kernels.tpu": "pallas_kernels.contract pallas_kernels.dispatch pallas_kernels.orders",
    "pallas_kernels.gpu": "pallas_kernels.contract pallas_kernels.dispatch pallas_kernels.orders",
    "pallas_kernels": """pallas_kernels.apart pallas_kernels.arguments pallas_kernels.dispatch pallas_kernels.gpu
                         pallas_kernels.orders pallas_kernels.portable pallas_kernels.tpu""",
    "errors": "",
    "cli": "errors",
    "packaged": "errors",
    "storage": "errors",
    "measuring": "errors storage",
    "ranges": "errors",
    "arrays": "errors",
    "lora": "errors",
    "ops": "pallas_kernels pallas_kernels.dispatch",
    "checkpoints": "errors storage",
    "layers": "errors ops pallas_kernels pallas_kernels.apart ranges",
    "data": "cli errors ranges storage",
    "models": "arrays cli errors layers pallas_kernels ranges",
    "heads": "errors layers models",
    "counting": "errors layers models pallas_kernels",
    "weights": "arrays checkpoints cli errors layers lora models storage",
    "segmentation": "errors heads layers models ranges weights",
    "detection": "data errors heads layers models weights",
    "factory": "models weights",
    "preprocessing": "data errors models",
    "evmamba_jax": "factory models preprocessing",
    "config": "data errors ranges",
    "pruning": "arrays checkpoints cli counting errors layers models storage weights",
    "reports": "errors pruning storage",
    "tasks": "arrays config data detection errors heads layers models ranges reports segmentation storage weights",
    "training": """arrays checkpoints config data errors evmamba_jax layers lora packaged pruning reports storage
                   tasks weights""",
    "train": "cli packaged training",
    "dense": "arrays data errors preprocessing tasks weights",
    "answers": "data detection errors reports storage",
    "predict": """answers arrays checkpoints cli data dense errors models preprocessing reports storage training
                  weights""",
    "verify": "cli config data errors models preprocessing storage tasks training",
    "preflight": """cli counting data errors evmamba_jax measuring models packaged pallas_kernels pallas_kernels.tpu
                    tasks training""",
    "analysis": """answers arrays cli counting data dense detection errors evmamba_jax heads layers measuring models
                   pallas_kernels predict preflight preprocessing reports segmentation storage tasks training
                   weights""",
    "__main__": "cli evmamba_jax",
    "recipes": "data errors tasks training",
    "configs": "data evmamba_jax recipes tasks training",
    "train_tpu": "train",
    "setup": "",
    "benchmarks": """analysis arrays checkpoints cli configs data detection errors evmamba_jax layers measuring models
                     pallas_kernels pallas_kernels.gpu pallas_kernels.tpu predict preflight pruning reports tasks
                     training weights""",
    "tests": """__main__ analysis answers arrays benchmarks checkpoints cli config configs counting data dense detection
                errors evmamba_jax heads layers lora measuring models ops packaged pallas_kernels pallas_kernels.apart
                pallas_kernels.gpu pallas_kernels.tpu predict preflight preprocessing pruning ranges reports
                segmentation storage tasks train train_tpu training verify weights""",
}
TREES = ("pallas_kernels", "evmamba_jax", "configs", "benchmarks", "tests")


def room_of(name):
    """Return the room of a dotted name of ours, None for anything else."""
    first, second = [*name.split("."), ""][:2]
    inside = (ROOT / first / f"{second}.py").is_file() or (ROOT / first / second).is_dir()
    if first == "evmamba_jax":
        return second if second and inside and second != "__init__" else first
    if first == "pallas_kernels":  # its public functions, each in a file of its own name, are one room
        return f"{first}.{second}" if inside and second not in ("", "__init__", "scan2d", "selective_scan") else first
    return first if first in (*TREES, "train_tpu", "setup") else None


def python_files():
    """Return every Python file of the project with its room."""
    files = [*ROOT.glob("*.py"), *(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))]
    return [(path, room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))) for path in files]


def imported(path):
    """Yield the dotted names that a file imports; scripts find neighbours by their bare names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno} imports by dots"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names)


def stems(tree):
    return {path.stem for path in (ROOT / tree).rglob("*.py")}


def test_every_room_has_a_row():
    assert {room for _, room in python_files()} == set(ROWS)


def test_rows_name_only_rows_above():
    above = set()
    for room, row in ROWS.items():
        assert set(row.split()) <= above, f"{room} may import {set(row.split()) - above}, which stand below or nowhere"
        above.add(room)


@pytest.mark.parametrize("room", ROWS)
def test_a_room_imports_only_what_its_row_names(room):
    trees = {"tests", "benchmarks"} - {room, *ROWS[room].split()}
    strangers = {stem for tree in trees for stem in stems(tree)} - stems(room) - sys.stdlib_module_names
    for path in [path for path, its_room in python_files() if its_room == room]:
        for line, name in imported(path):
            target = room_of(name)
            place = f"{path.relative_to(ROOT)}:{line} imports {name}"
            assert target in (None, room, *ROWS[room].split()), place
            assert name.split(".")[0] not in strangers, f"{place}, which is of {' or '.join(trees)}"


def test_every_folder_of_the_package_is_in_the_wheel():
    for tree in ("pallas_kernels", "evmamba_jax"):
        for folder in {path.parent for path in (ROOT / tree).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"setup.py does not find {folder.relative_to(ROOT)}"


def test_no_module_takes_unix_to_be_imported():
    for path, _ in python_files():
        if path.relative_to(ROOT).parts[0] in ("pallas_kernels", "evmamba_jax"):
            whole = ast.parse(path.read_text())
            names = {
                name.split(".")[0]
                for node in whole.body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
            }
            assert not names & {"fcntl", "grp", "pty", "pwd", "resource", "termios"}, path


def test_the_kernels_import_only_jax():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        roots = {name.split(".")[0] for _, name in imported(path)}
        standard = sys.stdlib_module_names
        assert roots <= standard | {"jax", "numpy", "einops", "pallas_kernels"}, f"{path.name}: {roots}"
