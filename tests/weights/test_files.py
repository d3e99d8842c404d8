"""Files of weights: read as they are, refused when damaged, and never run."""

import json
import os
import pickle
import struct
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax.errors import WeightsError
from clip_jax.weights.files import open_shards, open_tensors

GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"
ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.c": np.float16([1.5, -2]),
    "scalar": np.array(3.25, np.float32),
    "whole": np.arange(3),
}


def all_of(tensors):
    return {name: tensors.read(name) for name in tensors.shapes}


def assert_read(tensors, arrays=ARRAYS):
    assert tensors.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in all_of(tensors).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])


@pytest.fixture
def safetensors(tmp_path):
    save_file(ARRAYS, tmp_path / "weights.dat")
    return tmp_path / "weights.dat"


def test_safetensors_whatever_the_name(safetensors):
    assert_read(open_tensors(safetensors))


def test_safetensors_in_bfloat16(tmp_path):
    array = np.arange(4).astype(ml_dtypes.bfloat16)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", len(header)) + header + array.tobytes())
    np.testing.assert_array_equal(open_tensors(path).read("a").astype(np.float32), range(4))


def test_numbers_that_no_weights_have(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsError, match="a has numbers of type F8_E4M3, expected one of F64"):
        open_tensors(path)


@pytest.mark.parametrize("kept", [30, 100, -1, -10])
def test_truncated_safetensors(safetensors, kept):
    safetensors.write_bytes(safetensors.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"weights\.dat is damaged .* fetch it again"):
        open_tensors(safetensors)


@pytest.mark.parametrize(
    "lie",
    [
        {"data_offsets": [0, 400]},
        {"data_offsets": [0, 8]},
        {"data_offsets": [8, 0]},
        {"shape": [2, 300]},
        {"shape": [2**40, 2**40]},
        {"dtype": "F1000"},
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, lie):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | lie
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(WeightsError, match="is damaged"):
        open_tensors(path)


def test_a_safetensors_header_longer_than_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b'{"a":{}}')
    with pytest.raises(WeightsError, match="is damaged"):
        open_tensors(path)


def write_shards(folder):
    for number, names in enumerate((["a", "b.c"], ["scalar", "whole"])):
        save_file({name: ARRAYS[name] for name in names}, folder / f"{number}.safetensors")
    shard_of = {"a": 0, "b.c": 0, "scalar": 1, "whole": 1}
    index = {"weight_map": {name: f"{n}.safetensors" for name, n in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json", index


def test_shards(tmp_path):
    assert_read(open_shards(write_shards(tmp_path)[0]))


def test_shards_that_are_missing_or_lack_an_array(tmp_path):
    path, index = write_shards(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"d": "1.safetensors"}}))
    with pytest.raises(WeightsError, match="lists arrays that no shard holds: d"):
        open_shards(path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lists 1\.safetensors, which are not beside it"):
        open_shards(path)
    path.write_text("{}")
    with pytest.raises(WeightsError, match="is no index of shards"):
        open_shards(path)


def test_numpy_archives_with_bfloat16_too(tmp_path):
    path = tmp_path / "a"
    with open(path, "wb") as file:
        np.savez(file, **ARRAYS, half=np.arange(4).astype(ml_dtypes.bfloat16))
    tensors = open_tensors(path)
    np.testing.assert_array_equal(tensors.read("half").astype(np.float32), range(4))
    assert tensors.shapes.pop("half") == (4,)
    assert_read(tensors)


def test_a_numpy_archive_with_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([print], dtype=object))
    with pytest.raises(WeightsError, match=r"a\.npz is damaged at a: .*allow_pickle"):
        open_tensors(path).read("a")


@pytest.mark.parametrize("name", ["vit_torchscript.pt", "resnet_state_dict.pt"])
def test_torch_archives_are_read_without_torch(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would raise
    tensors = open_tensors(GOLDENS / name)
    assert tensors.shapes["visual.conv1.weight"][1] == 3
    assert ("input_resolution" in tensors.shapes) == (name == "vit_torchscript.pt")
    arrays = all_of(tensors)
    assert arrays["text_projection"].dtype == np.float16
    for key, array in arrays.items():
        assert array.shape == tensors.shapes[key]
        assert key == "attn_mask" or np.isfinite(array).all()


@pytest.mark.parametrize("name", ["vit_torchscript.pt", "resnet_state_dict.pt"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_torch_archives(name, share, tmp_path):
    whole = (GOLDENS / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=r"\.pt is damaged .* fetch it again"):
        open_tensors(path)


def test_a_flipped_bit_in_a_torch_archive(tmp_path):
    whole = bytearray((GOLDENS / "resnet_state_dict.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    path = tmp_path / "a.pt"
    path.write_bytes(whole)
    with pytest.raises(WeightsError, match=r"a\.pt is damaged"):
        all_of(open_tensors(path))


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_archive(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def test_a_pickle_with_code_in_it_is_refused_before_anything_runs(tmp_path):
    evil = {"state_dict": {"a": Malicious(tmp_path / "ran")}}
    path = torch_archive(tmp_path / "a.pt", pickle.dumps(evil, protocol=2))
    with pytest.raises(WeightsError, match=r"it asks for posix\.mkdir.* code is never run"):
        open_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93(\x8c\x011tR.",
        b"\x80\x04\x8c\x11clip_jax.weights\x8c\x05files\x93.",
        b"c__builtin__\ngetattr\n.",
        b"\x80\x02K\x01.",
        b"",
        b"junk",
    ],
)
def test_pickles_that_are_no_state_dict(tmp_path, program):
    path = torch_archive(tmp_path / "a.pt", program)
    with pytest.raises(WeightsError):
        open_tensors(path)


def tensor_pickle(offset, shape, strides, length=6):
    """What torch pickles for {"a": a tensor of floats}, opcode by opcode."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + number(length) + b"tQ"
    sizes = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides)]
    arguments = storage + number(offset) + b"".join(sizes) + b"\x89}"
    return b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def number(value):
    return b"J" + struct.pack("<i", value)


def one_tensor(path, *arguments, stored=6):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", tensor_pickle(*arguments))
        archive.writestr("x/data/0", np.arange(stored, dtype=np.float32).tobytes())
    return path


def test_offset_and_strides_count(tmp_path):
    path = one_tensor(tmp_path / "a.pt", 1, (2, 2), (1, 2))
    np.testing.assert_array_equal(open_tensors(path).read("a"), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    "arguments", [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 3), (4, 1)), (-1, (2,), (1,)),
                  (0, (2,), (-1,)), (0, (-2,), (1,))]
)  # fmt: skip
def test_a_tensor_that_reaches_beyond_its_storage(tmp_path, arguments):
    with pytest.raises(WeightsError, match="reaches beyond its storage"):
        open_tensors(one_tensor(tmp_path / "a.pt", *arguments))


def test_a_storage_that_is_shorter_than_it_says(tmp_path):
    path = one_tensor(tmp_path / "a.pt", 0, (6,), (1,), stored=5)
    with pytest.raises(WeightsError, match="expected 6 values of float32, found 20 bytes"):
        open_tensors(path).read("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no file of weights"),
        (b"hello", "is no file of weights"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is no file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "is damaged"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_tensors(path)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"neither torch.s .* nor NumPy.s"):
        open_tensors(tmp_path / "a.npz")


@pytest.fixture
def restless_threads():
    """Threads take turns a thousand times as often as they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 1000)
    yield
    sys.setswitchinterval(interval)


def test_threads_may_read_a_zip_file_at_once(tmp_path, restless_threads):
    arrays = {str(n): np.full(20_000, n, np.float32) for n in range(50)}
    np.savez(tmp_path / "a.npz", **arrays)
    tensors = open_tensors(tmp_path / "a.npz")
    names = 20 * list(arrays)
    with ThreadPoolExecutor(8) as threads:
        for name, array in zip(names, threads.map(tensors.read, names), strict=True):
            np.testing.assert_array_equal(array, arrays[name])
