"""Weight files of PyTorch projects as NumPy arrays, without torch and without running anything they contain."""

import io
import mmap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any, cast

import ml_dtypes
import numpy as np
import safetensors.numpy

from evmamba_jax.errors import UserError, nearest
from evmamba_jax.storage import local
from evmamba_jax.weights import inert_pickle
from evmamba_jax.weights.inert_pickle import Global

# Where official training code keeps the weights inside its checkpoints, in the order in which we look.
_AVERAGES = ("model_ema", "state_dict_ema", "ema_model")
_CONTAINERS = ("model", "state_dict", "model_state_dict", *_AVERAGES)
# Put before every name by DistributedDataParallel, by copies made for averaging, and by torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


def load_torch_file(path: str | PathLike[str], *, key: str | None = None) -> dict[str, np.ndarray]:
    """Read the weights in a PyTorch or safetensors file.

    Reads what ``torch.save`` writes (.pth, .pt, .pth.tar, .bin; the zip format and the stream format before torch 1.6)
    and .safetensors, told apart by content. Only the chosen weights are read, not the optimizer beside them. Classes
    and functions in the file are never looked up or called, whatever they are.

    Checkpoints of training code hold several things. Without ``key`` the weights are the first of ``model``,
    ``state_dict``, ``model_state_dict``, ``model_ema``, ``state_dict_ema``, ``ema_model`` that holds tensors, else the
    file itself. The prefixes ``module.`` and ``_orig_mod.`` are removed, repeatedly, where every name has them.

    Args:
        path: the file.
        key: the top-level entry to take instead, for example ``"model_ema"``.

    Returns:
        ``{name: array}`` in the order of the file, dtypes as stored (bfloat16 as ``ml_dtypes.bfloat16``). Tensors that
        shared memory still do. Entries that are not tensors are left out.

    Raises:
        UserError: the file is missing, of another kind, damaged or without tensors, or has no entry ``key``.
    """
    return read_torch_file(path, key=key)[0]


def read_torch_file(
    path: str | PathLike[str], *, key: str | None = None, average: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Return what :func:`load_torch_file` does, and the entry of the file that it is; empty for the file itself.

    Args:
        path: the file.
        key: the entry to take.
        average: take the entry with a moving average: ``model_ema``, ``state_dict_ema`` or ``ema_model``.
    """
    given, path = str(path), local(path)
    if not path.is_file():
        raise UserError(f"{given!r} is not an existing file; give the path of a .pth, .pt or .safetensors file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"PK\x03\x04"):
            arrays, entry = _read_zip(path, key, average)
        elif start[8:9] == b"{":  # a header of JSON behind its length
            arrays, entry = _read_safetensors(path, key, average), ""
        elif _is_legacy(start):
            arrays, entry = _read_legacy(path, key, average)
        else:
            raise UserError(
                f"{given!r} is no weight file: it starts with {start[:8]!r}; "
                "allowed are files written by torch.save and safetensors"
            )
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{given!r} cannot be read: {_one_line(error)}") from error
    except Exception as error:  # whatever a damaged file makes zipfile, the pickle reader or safetensors raise
        raise UserError(
            f"{given!r} is damaged or incomplete ({type(error).__name__}: {_one_line(error)}); download it again"
        ) from error
    return _without_wrappers(arrays), entry


@dataclass(frozen=True)
class _Storage:
    """A block of memory in a torch file: its name there and what its elements are."""

    key: str
    dtype: np.dtype
    size: int  # elements


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a torch file before its memory is read; offset and strides count elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, buffer: bytearray) -> np.ndarray:
        """Return the view of ``buffer`` (the bytes of the storage) that this tensor is; NumPy checks that it fits."""
        itemsize = self.dtype.itemsize
        if len(buffer) < self.storage.size * self.storage.dtype.itemsize:
            raise ValueError(f"storage {self.storage.key} is cut short")
        return np.ndarray(self.shape, self.dtype, buffer, self.offset * itemsize, [s * itemsize for s in self.strides])


def _rebuild_dict(items: Any = ()) -> dict[str | int, Any]:
    return {key: value for key, value in items if isinstance(key, str | int)}


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_of_dtype(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, grad: Any, hooks: Any, dtype: Global, *_: Any
) -> _Tensor:
    return _Tensor(storage, _DTYPES[dtype.name.removeprefix("torch.")], offset, tuple(shape), tuple(strides))


def _rebuild_subclass(function: Any, subclass: Any, args: tuple, *_: Any) -> Any:
    return inert_pickle.call(function, args, _REBUILD)


# Every call that is answered when a pickle is read. All others give inert objects.
_REBUILD: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _rebuild_dict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
}


def _storage(persistent_id: Any) -> _Storage:
    kind, type_, key, _location, size, *view = persistent_id
    if kind != "storage" or not isinstance(key, str) or not isinstance(size, int) or any(v is not None for v in view):
        raise ValueError("persistent id of an unknown kind")
    return _Storage(key, _DTYPES[_STORAGE_DTYPES[type_.name.rpartition(".")[2]]], size)


def _read_zip(path: Path, key: str | None, average: bool) -> tuple[dict[str, np.ndarray], str]:
    """Read the format of torch 1.6 and later: ROOT/data.pkl and one uncompressed member ROOT/data/KEY a storage."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if not pickles:
            raise UserError(f"{str(path)!r} is a zip file without data.pkl, not written by torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in archive.namelist():
            raise UserError(f"{str(path)!r} is a TorchScript program; save its state_dict() with torch.save instead")

        def member(name: str) -> bytes:
            info = archive.getinfo(root + name)
            # torch never compresses, so a size beyond the file's is damage (or a bomb)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
                raise ValueError(f"member {info.filename} is compressed or longer than the file")
            return archive.read(info)

        if f"{root}byteorder" in archive.namelist() and member("byteorder") != b"little":
            raise UserError(f"{str(path)!r} was written on a big-endian machine, which is not supported; save it again")
        content = inert_pickle.load(io.BytesIO(member("data.pkl")), _REBUILD, _storage)
        tensors, entry = _weights(path, content, key, average)
        return _arrays(tensors, lambda storage: member(f"data/{storage.key}")), entry


def _is_legacy(start: bytes) -> bool:
    try:
        return inert_pickle.load(io.BytesIO(start), {}, _storage) == _LEGACY_MAGIC
    except Exception:  # anything but a pickle
        return False


def _read_legacy(path: Path, key: str | None, average: bool) -> tuple[dict[str, np.ndarray], str]:
    """Read the format before torch 1.6: five pickles in a row, then each storage as its length and its elements."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        stream = cast("IO[bytes]", mapped)  # it reads like a file
        storages: dict[str, _Storage] = {}

        def register(persistent_id: Any) -> _Storage:
            storage = _storage(persistent_id)
            return storages.setdefault(storage.key, storage)

        inert_pickle.load(stream, {}, register)  # the magic number, checked by the caller
        if inert_pickle.load(stream, {}, register) != _LEGACY_PROTOCOL:
            raise ValueError("unknown version of the format before torch 1.6")
        inert_pickle.load(stream, {}, register)  # the writer's machine; the elements are little-endian on any
        content = inert_pickle.load(stream, _REBUILD, register)
        keys = inert_pickle.load(stream, {}, register)
        places: dict[str, slice] = {}
        position = stream.tell()
        for name in keys:
            size = int.from_bytes(mapped[position : position + 8], "little", signed=True)
            if size != storages[name].size:
                raise ValueError(f"storage {name} has {size} elements instead of {storages[name].size}")
            places[name] = slice(position + 8, position + 8 + size * storages[name].dtype.itemsize)
            position = places[name].stop
        tensors, entry = _weights(path, content, key, average)
        return _arrays(tensors, lambda storage: mapped[places[storage.key]]), entry


def _read_safetensors(path: Path, key: str | None, average: bool) -> dict[str, np.ndarray]:
    if average:
        raise UserError(f"{str(path)!r} is a safetensors file, which has no entry with a moving average")
    if key is not None:
        raise UserError(
            f"key {key!r} was given, but {str(path)!r} is a safetensors file, which has no entries; omit it"
        )
    arrays = safetensors.numpy.load_file(path)
    if not arrays:
        raise UserError(f"{str(path)!r} holds no tensors")
    return arrays


def _arrays(tensors: Mapping[str, _Tensor], read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """Read each storage once, however many tensors share it."""
    buffers: dict[str, bytearray] = {}  # writable, unlike bytes
    for tensor in tensors.values():
        if tensor.storage.key not in buffers:
            buffers[tensor.storage.key] = bytearray(read(tensor.storage))
    return {name: tensor.array(buffers[tensor.storage.key]) for name, tensor in tensors.items()}


def _weights(path: Path, content: Any, key: str | None, average: bool) -> tuple[dict[str, _Tensor], str]:
    """Choose the named tensors in what a torch file contains; return them and the name of their entry."""
    if not isinstance(content, dict):
        kind = content.name if isinstance(content, inert_pickle.Inert) else type(content).__name__.strip("_").lower()
        raise UserError(f"{str(path)!r} holds a {kind} instead of named tensors; save the model's state_dict() instead")
    entries = {name: _tensors(value) for name, value in content.items() if isinstance(name, str)}
    holders = [name for name, tensors in entries.items() if tensors]
    if key is not None:
        if key not in holders:
            raise UserError(
                f"{str(path)!r} has no entry {key!r} with tensors{nearest(key, holders)}; "
                f"entries with tensors: {_listing(holders)}"
            )
        return entries[key], key
    for name in _AVERAGES if average else _CONTAINERS:
        if name in holders:
            return entries[name], name
    if average:
        raise UserError(
            f"{str(path)!r} has no moving average (no entry {_listing(_AVERAGES)}); "
            f"entries with tensors: {_listing(holders)}"
        )
    tensors = _tensors(content)
    if not tensors:
        advice = f"choose one of key={_listing(holders)}" if holders else "save the model's state_dict() instead"
        raise UserError(f"{str(path)!r} has no tensors under its entries {_listing(content)}; {advice}")
    return tensors, ""


def _tensors(value: Any) -> dict[str, _Tensor]:
    if not isinstance(value, dict):
        return {}
    return {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, _Tensor)}


def _without_wrappers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while prefix := next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in arrays)), None):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _listing(names: Any) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
