"""Torch's zip archives, TorchScript or not, read without torch and without running their code.

Such an archive holds the arrays as plain files and a pickle that says which is which. A pickle is a
program; the reader here gives it nothing to call but the few functions below, which make
descriptions of tensors, containers and inert objects. `torch.jit.load` would run the archive's
code, and `torch.load(weights_only=True)` refuses TorchScript, the form of OpenAI's releases.
"""

import collections
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from clip_jax.errors import WeightsError
from clip_jax.weights.mapping import Shape, Tensors

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: Shape
    strides: Shape  # in elements


class _Module:
    """Stands for an object of the archive: attributes, no behaviour."""


class _StorageType(NamedTuple):
    dtype: np.dtype


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Shape, strides: Shape, *_: Any
) -> _Tensor:
    tensor = _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
    last = tensor.offset + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
    )
    if (
        tensor.offset < 0
        or min(tensor.shape, default=0) < 0
        or min(tensor.strides, default=0) < 0
        or (0 not in tensor.shape and last >= storage.length)
    ):
        raise pickle.UnpicklingError(f"a tensor {tensor} reaches beyond its storage")
    return tensor


# All that a pickle may call or name. TorchScript keeps lists of numbers through the last five.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in DTYPES.items()},
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): list
        for kind in ("int", "double", "bool", "tensor")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, length = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it asks for a {kind!r}")
        return _Storage(str(key), storage_type.dtype, int(length))


def open_archive(path: Path, archive: zipfile.ZipFile) -> Tensors:
    """The parameters and buffers of a state dict, a training checkpoint or a TorchScript module.

    Raises:
        WeightsError: damaged, or a pickle that asks for more than tensors.
    """
    (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl")
    root = pickled.removesuffix("data.pkl")
    try:
        if f"{root}byteorder" in archive.namelist():
            order = archive.read(f"{root}byteorder").decode()
            if order != "little":
                raise WeightsError(f"{path} was written on a {order}-endian machine")
        with archive.open(pickled) as file:
            loaded = _Unpickler(file).load()
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is damaged: {error}; fetch it again") from error
    except Exception as error:  # a pickle that is no state dict fails in any way it likes
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{path} holds more than arrays, and was not read ({error}): a state dict has tensors, "
            "numbers, strings and containers only. Weights are data; code is never run"
        ) from error
    state = state_dict(loaded, _Tensor, path)

    def read(name: str) -> np.ndarray:
        tensor = state[name]
        dtype = tensor.storage.dtype
        try:
            data = archive.read(f"{root}data/{tensor.storage.key}")
        except (KeyError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path} is damaged at {name}: {error}; fetch it again") from error
        if len(data) < tensor.storage.length * dtype.itemsize:
            raise WeightsError(
                f"{path} is damaged at {name}: expected {tensor.storage.length} values of {dtype}, "
                f"found {len(data)} bytes"
            )
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        flat = np.frombuffer(data, dtype)[tensor.offset :]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return Tensors(str(path), {name: tensor.shape for name, tensor in state.items()}, read)


def state_dict(loaded: Any, tensor_type: type, path: Path) -> dict[str, Any]:
    """The tensors of what a torch file holds, by their dotted names.

    A training checkpoint keeps the model under `state_dict`; data-parallel training puts `module.`
    before every name.

    Raises:
        WeightsError: no tensors there.
    """
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    try:
        state = dict(_named_tensors(loaded, "", tensor_type))
    except RecursionError:
        state = {}
    if not state:
        raise WeightsError(f"{path} holds no state dict: there are no named tensors in it")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _named_tensors(value: Any, prefix: str, tensor_type: type) -> Any:
    members = vars(value) if isinstance(value, _Module) else value
    for name, member in members.items() if isinstance(members, Mapping) else ():
        if isinstance(member, tensor_type):
            yield f"{prefix}{name}", member
        elif isinstance(member, Mapping | _Module):
            yield from _named_tensors(member, f"{prefix}{name}.", tensor_type)
