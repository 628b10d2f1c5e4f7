"""Weight files written by real torch (tests/golden/torch_files), hostile pickles, and damaged files."""

import io
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import chex
import ml_dtypes
import numpy as np
import pytest

from evmamba_jax.errors import UserError
from evmamba_jax.weights import load_torch_file

FILES = Path(__file__).parents[1] / "golden" / "torch_files"


def ramp(shape, start=0.0):
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) * 0.125 + start).astype(np.float32)


def weights(start=0.0):
    return {
        "conv.weight": ramp((2, 3, 2, 2), start),
        "conv.bias": ramp((2,), start - 1),
        "norm.num_batches_tracked": np.asarray(7),
    }


MODULE = weights() | {
    f"norm.{name}": np.ones(2, np.float32) for name in ("weight", "bias", "running_mean", "running_var")
}


@pytest.mark.parametrize(
    ("file", "key", "expected"),
    [
        ("zip.pth", None, weights()),
        ("legacy.pth", None, weights()),
        ("training.pth.tar", None, MODULE),
        ("training.pth.tar", "model", MODULE),
        ("training.pth.tar", "model_ema", weights(100.0)),
        ("training_legacy.pth", None, MODULE),
        ("training_legacy.pth", "model_ema", weights(100.0)),
        ("ddp.pth", None, weights()),
        ("ema_only.pth", None, weights()),
        ("other_entry.pth", "network", weights()),
        ("parameter.bin", None, {"weight": ramp((2, 2))}),
    ],
)
def test_finds_the_weights_in_what_training_code_saves(file, key, expected):
    arrays = load_torch_file(FILES / file, key=key)
    assert sorted(arrays) == sorted(expected)
    chex.assert_trees_all_equal(arrays, expected)


@pytest.mark.parametrize("file", ["dtypes.pth", "dtypes_legacy.pth", "dtypes.safetensors"])
def test_every_dtype(file):
    arrays = load_torch_file(FILES / file)
    assert len(arrays) == {"dtypes.pth": 17, "dtypes_legacy.pth": 12, "dtypes.safetensors": 10}[file]
    for name, array in arrays.items():
        assert array.dtype == (getattr(ml_dtypes, name) if "float8" in name or name == "bfloat16" else np.dtype(name))
        expected = [[1, 0, 1], [0, 0, 1]] if name == "bool" else [[1, 2, 3], [4, 5, 6]]
        np.testing.assert_array_equal(array.astype(np.complex128), expected)


@pytest.mark.parametrize("file", ["views.pth", "views_legacy.pth"])
def test_views_keep_their_shape_order_and_memory(file):
    arrays = load_torch_file(FILES / file)
    base = ramp((4, 6))
    chex.assert_trees_all_equal(
        arrays,
        {
            "base": base,
            "transposed": base.T,
            "rows": base[1:3],
            "steps": base[::2, 1::3],
            "scalar": base[2, 3],
            "expanded": np.broadcast_to(ramp((3, 1)), (3, 4)),
            "empty": base[:0],
            "channels_last": ramp((1, 2, 3, 4)),
            "tied": base,
        },
    )
    arrays["base"][0, 0] = -1
    assert arrays["tied"][0, 0] == arrays["transposed"][0, 0] == -1


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("absent.pth", None, "not an existing file"),
        ("no_tensors.pth", None, "no tensors under its entries 'epoch', 'args'"),
        ("other_entry.pth", None, "choose one of key='network'"),
        ("whole_module.pth", None, "holds a torch.nn.modules.container.Sequential instead of named tensors"),
        ("training.pth.tar", "model_emma", "no entry 'model_emma' with tensors, did you mean 'model_ema'"),
        ("training.pth.tar", "epoch", "entries with tensors: 'model_ema', 'model'"),
        ("dtypes.safetensors", "model", "safetensors file, which has no entries"),
    ],
)
def test_mistakes_are_named_in_one_line(file, key, message):
    with pytest.raises(UserError) as error:
        load_torch_file(FILES / file, key=key)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(64), pickle.dumps({"a": 1})]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no weight file: it starts with"):
        load_torch_file(path)


def test_a_zip_of_another_program_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"without data\.pkl"):
        load_torch_file(path)


def test_a_compressed_storage_is_refused(tmp_path):
    """A few kilobytes could grow to terabytes."""
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(FILES / "zip.pth") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    with pytest.raises(UserError, match="compressed"):
        load_torch_file(path)


class Reduces:
    """Pickles as the call ``function(*args)``, followed by a state when one is given."""

    def __init__(self, function, args, state=None):
        self.reduction = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduction


class TakesState:
    """Runs a command when it is unpickled with a state."""

    def __setstate__(self, state):
        os.system(state["command"])


def _opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def hostile_pickles(command: str) -> dict[str, bytes]:
    """Return pickles that run ``command`` when ``pickle.loads`` reads them, or that try known ways round a filter."""
    code = f"__import__('os').system({command!r})"
    state = TakesState()
    state.command = command
    return {
        "system": pickle.dumps(Reduces(os.system, (command,))),
        "system, protocol 0": pickle.dumps(Reduces(os.system, (command,)), 0),
        "eval": pickle.dumps({"model": Reduces(eval, (code,))}),
        "exec": pickle.dumps({"state_dict": {"weight": Reduces(exec, (code,))}}),
        "nested": pickle.dumps(Reduces(str, (Reduces(eval, (code,)),))),
        "getattr": _opcodes(
            b"cbuiltins\ngetattr\n",
            b"cbuiltins\n__import__\n",
            _text("os"),
            b"\x85R",
            _text("system"),
            b"\x86R",
            _text(command),
            b"\x85R",
        ),
        "dotted name": _opcodes(_text("builtins"), _text("eval"), b"\x93", _text(code), b"\x85R"),
        "dotted attribute": _opcodes(_text("shutil"), _text("os.system"), b"\x93", _text(command), b"\x85R"),
        "dotted name through an allowed class": _opcodes(
            _text("collections"), _text("OrderedDict.__init__.__globals__"), b"\x93", _text(command), b"\x85R"
        ),
        "state": pickle.dumps({"model": state}),
        "state and items": pickle.dumps(Reduces(TakesState, (), {"command": command})),
        "INST": b"(S" + repr(command).encode() + b"\nios\nsystem\n.",
        "OBJ": _opcodes(b"(cos\nsystem\n", _text(command), b"o"),
        "NEWOBJ": _opcodes(b"cos\nsystem\n", _text(command), b"\x85\x81"),
        "NEWOBJ_EX": _opcodes(b"cos\nsystem\n", _text(command), b"\x85}\x92"),
        "subclass": _opcodes(
            b"ctorch._tensor\n_rebuild_from_type_v2\n",
            b"(cos\nsystem\nN",
            _text(command),
            b"\x85NtR",
        ),
        "ordered dictionary of calls": _opcodes(
            b"ccollections\nOrderedDict\n", b"(cbuiltins\nmap\n(cos\nsystem\n](", _text(command), b"etRtR"
        ),
        "default factory": _opcodes(b"ccollections\ndefaultdict\ncos\ngetcwd\n\x85R", _text("key"), b"K\x01s"),
        "extension": _opcodes(b"\x82\x01", _text(command), b"\x85R"),
        "persistent id": _opcodes(b"(", _text("storage"), b"cos\nsystem\n", _text(command), b"K\x01K\x01tQ"),
    }


def _as_zip(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


def _as_legacy(path: Path, content: bytes) -> None:
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(head + content + pickle.dumps([], 2))


@pytest.mark.parametrize("write", [_as_zip, _as_legacy])
@pytest.mark.parametrize("name", hostile_pickles(""))
def test_hostile_pickles_run_nothing(tmp_path, name, write):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    write(path, hostile_pickles(f"touch {marker}")[name])
    with pytest.raises(UserError):
        load_torch_file(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["system", "system, protocol 0", "eval", "exec", "nested", "getattr", "dotted name",
                                  "dotted attribute", "state", "state and items", "INST", "OBJ"])  # fmt: skip
def test_the_hostile_pickles_are_real(tmp_path, name):
    marker = tmp_path / "marker"
    pickle.loads(hostile_pickles(f"touch {marker}")[name])
    assert marker.exists()


def test_foreign_objects_beside_the_weights_are_harmless(tmp_path):
    """The weights still load when something hostile sits in the same dictionary."""
    marker = tmp_path / "marker"
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(FILES / "zip.pth") as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):  # the OrderedDict is on the stack before the final opcode
                attack = _text("args") + b"cos\nsystem\n" + _text(f"touch {marker}") + b"\x85Rs."
                content = content[:-1] + attack
            target.writestr(info.filename, content)
    chex.assert_trees_all_equal(load_torch_file(path), weights())
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        _opcodes(b"Nr\xff\xff\xff\x7f"),  # memo index: the C unpickler would allocate 32 GiB
        _opcodes(b"\x8e" + struct.pack("<Q", 2**40)),  # bytes of a terabyte
        _opcodes(b")" + b"\x85" * 200_000 + b"}\x94h\x000Nh\x00N" + b"s"),  # deeply nested
        _opcodes(b"}" + b")" + b"\x85" * 200_000 + b"Ns"),  # a deeply nested key
        _opcodes(b"](" + b"]\x94" + b"(h\x00h\x00e\x94(h\x01h\x01e" + b"e0"),
    ],
)
@pytest.mark.parametrize("write", [_as_zip, _as_legacy])
def test_oversized_pickles_end_in_an_error(tmp_path, content, write):
    path = tmp_path / "weights.pth"
    write(path, content)
    with pytest.raises(UserError):
        load_torch_file(path)


@pytest.mark.parametrize("file", ["views.pth", "training_legacy.pth", "training.pth.tar", "dtypes.safetensors"])
def test_damaged_files_end_in_an_error_or_in_arrays(tmp_path, file):
    """Whatever bits flip or wherever the file ends: a UserError or a dictionary, never another exception."""
    rng = random.Random(file)
    whole = (FILES / file).read_bytes()
    path = tmp_path / file
    messages, loaded = [], 0
    for attempt in range(250):
        data = bytearray(whole)
        if attempt % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 3, 20))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            arrays = load_torch_file(path)
        except UserError as error:
            messages.append(str(error))
        else:
            assert all(isinstance(array, np.ndarray) for array in arrays.values())
            loaded += 1
    assert messages
    assert loaded
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("file", ["zip.pth", "legacy.pth", "dtypes.safetensors"])
def test_a_truncated_file_is_called_incomplete(tmp_path, file):
    path = tmp_path / file
    path.write_bytes((FILES / file).read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_torch_file(path)


def test_only_the_chosen_storages_are_read(tmp_path, monkeypatch):
    """The optimizer beside the weights may be many times larger."""
    read = []
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, info: read.append(info.filename) or self.open(info).read()
    )
    load_torch_file(FILES / "training.pth.tar", key="model_ema")
    storages = [name for name in read if "/data/" in name]
    with zipfile.ZipFile(io.BytesIO((FILES / "training.pth.tar").read_bytes())) as archive:
        total = sum("/data/" in name for name in archive.namelist())
    assert len(storages) == 3 < total
