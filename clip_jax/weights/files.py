"""Files of arrays: safetensors, NumPy archives and torch's, told apart by their first bytes.

Weights are data: nothing here runs what a file says. An array is read when it is asked for, and
memory holds no more of the file than that.
"""

import json
import mmap
import struct
import threading
import zipfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from clip_jax.errors import WeightsError
from clip_jax.weights import torch_archive
from clip_jax.weights.mapping import Shape, Tensors

_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02\x8a\nl\xfc\x9cF\xf9")
_LFS = b"version https://git-lfs"


def open_tensors(path: Path) -> Tensors:
    """Opens a file of arrays, whatever its name says.

    Raises:
        WeightsError: not such a file, damaged, or a pickle that holds more than arrays.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(_ZIP):
        return _open_zip(path)
    if len(start) > 8 and start[8:9] == b"{":
        return open_safetensors([path])
    if start.startswith(_LEGACY_TORCH):
        return _open_legacy_torch(path)
    if start.startswith(_LFS):
        raise WeightsError(
            f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository"
        )
    raise WeightsError(
        f"{path} is no file of weights: expected safetensors, a torch file (.pt, .bin) or a NumPy "
        f"archive (.npz), found one that starts with {start[:8]!r}"
    )


def open_safetensors(paths: Sequence[Path]) -> Tensors:
    """Opens one safetensors file, or the shards of one model.

    Raises:
        WeightsError: truncated, a header that does not describe the file, or a type of numbers that
            weights do not have.
    """
    places: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
    for path in paths:
        pages, arrays = _map_safetensors(path)
        if twice := sorted(places.keys() & arrays.keys()):
            raise WeightsError(f"{path} holds {twice[0]}, which another shard holds, too")
        places |= {name: (pages, array) for name, array in arrays.items()}

    def read(name: str) -> np.ndarray:
        pages, array = places[name]
        # Pages of a mapped file count as memory in use: let go of what was read before. Where
        # another thread still reads, they come back.
        pages.madvise(mmap.MADV_DONTNEED)
        return array

    return Tensors(_joined(paths), {name: a.shape for name, (_, a) in places.items()}, read)


def _map_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, np.ndarray]]:
    """A file's pages and the arrays that lie in them: nothing is copied, nothing read before it is
    touched. `safetensors` copies each array into new memory, which takes longer than all else."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # its header is sound, and agrees with the file's length
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged ({error}): its header and its length do not agree; fetch it again"
        ) from error
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, dtype, (begin, _) = entry["shape"], entry["dtype"], entry["data_offsets"]
        if dtype not in _SAFETENSORS_DTYPES:
            raise WeightsError(
                f"{path}: {name} has numbers of type {dtype}, expected one of "
                f"{', '.join(_SAFETENSORS_DTYPES)}"
            )
        flat = np.frombuffer(pages, _SAFETENSORS_DTYPES[dtype], prod(shape), 8 + length + begin)
        arrays[name] = flat.reshape(shape)
    return pages, arrays


_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_shards(index: Path) -> Tensors:
    """Opens the safetensors files that a `*.safetensors.index.json` lists.

    Raises:
        WeightsError: a shard is missing or damaged, or an array is not in its shard.
    """
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is no index of shards: {error!r}") from error
    paths = [index.parent / name for name in sorted(set(shard_of.values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise WeightsError(f"{index} lists {', '.join(missing)}, which are not beside it")
    tensors = open_safetensors(paths)
    if absent := sorted(set(shard_of) - set(tensors.shapes)):
        raise WeightsError(f"{index} lists arrays that no shard holds: {', '.join(absent)}")
    return tensors


def _joined(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more shards" if len(paths) > 1 else "")


def _open_zip(path: Path) -> Tensors:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{path} is damaged ({error}): its end is missing; fetch it again"
        ) from error
    names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        return _one_at_a_time(torch_archive.open_archive(path, archive))
    if names and all(name.endswith(".npy") for name in names):
        return _one_at_a_time(_open_npz(path, archive))
    raise WeightsError(
        f"{path} is a zip archive, but neither torch's (no data.pkl) nor NumPy's (not all .npy)"
    )


def _one_at_a_time(tensors: Tensors) -> Tensors:
    """For threads: members of a zip file that are read at once mix up (seen with Python 3.12.1)."""
    lock = threading.Lock()

    def read(name: str) -> np.ndarray:
        with lock:
            return tensors.read(name)

    return tensors._replace(read=read)


def _open_npz(path: Path, archive: zipfile.ZipFile) -> Tensors:
    shapes: dict[str, Shape] = {}
    try:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version](member)
                shapes[name.removesuffix(".npy")] = header[0]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is damaged at {name}: {error}") from error

    def read(name: str) -> np.ndarray:
        try:
            with archive.open(f"{name}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
        except (ValueError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path} is damaged at {name}: {error}") from error
        # NumPy has no bfloat16 and keeps it as two bytes without a meaning.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array

    return Tensors(str(path), shapes, read)


def _open_legacy_torch(path: Path) -> Tensors:
    """Files that torch wrote before 1.6: only torch itself reads them, under `weights_only`."""
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is in torch's format of before 1.6, which needs torch: "
            "pip install 'clip-nnx[torch]'"
        ) from error
    import pickle

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, struct.error) as error:
        raise WeightsError(
            f"{path} is damaged, or holds more than arrays, and was not read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    state = torch_archive.state_dict(loaded, torch.Tensor, path)

    def read(name: str) -> np.ndarray:
        tensor = state[name].detach()
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        return wide.numpy()

    return Tensors(str(path), {k: tuple(v.shape) for k, v in state.items()}, read)
