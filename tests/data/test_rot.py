"""Rot: ten thousand mutated records and shards; no crash, no hang, every good record delivered."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow as tf

from clip_jax.config import default_config
from clip_jax.data import reading, tar, tfrecord
from clip_jax.data.augment import DRAWS
from clip_jax.data.faults import Fault, Faults
from clip_jax.data.reading import ShardFile
from clip_jax.data.rows import RowFunction
from clip_jax.data.sources import open_source
from tests.data.records import encode, example, photograph, write_shard, write_tar

RECORDS = 20


def mutate(random, content, start, end):
    """Changes bytes within [start, end): a flipped bit, zeros, or noise."""
    content = bytearray(content)
    at = int(random.integers(start, end))
    length = min(int(2 ** random.uniform(0, 8)), end - at)
    kind = random.integers(3)
    if kind == 0:
        content[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        content[at : at + length] = bytes(length)
    else:
        content[at : at + length] = random.bytes(length)
    return bytes(content)


def differ(one, other, start, end):
    return one[start:end] != other[start:end]


def test_a_mutated_record_of_a_tfrecord_costs_no_other(tmp_path):
    random = np.random.default_rng(0)
    records = [random.bytes(int(random.integers(0, 400))) for _ in range(RECORDS)]
    frames = [tfrecord.frame(record) for record in records]
    ends = np.cumsum([0, *map(len, frames)])
    path = tmp_path / "0.tfrecord"
    content = b"".join(frames)
    for _ in range(1_000):
        hits = random.choice(RECORDS, 4, replace=False)
        mutated = content
        for hit in hits:
            mutated = mutate(random, mutated, ends[hit], ends[hit + 1])
        bad = {hit for hit in hits if differ(mutated, content, ends[hit], ends[hit + 1])}
        whole = RECORDS
        if random.random() < 0.2:
            whole = int(max(hits))
            mutated = mutated[: int(random.integers(ends[whole], ends[whole + 1]))]
        path.write_bytes(mutated)
        found = [record for _, record in tfrecord.records(ShardFile(str(path)))]
        good = [record for record in found if not isinstance(record, Fault)]
        assert good == [record for i, record in enumerate(records[:whole]) if i not in bad]
        assert len(good) < len(found) or not bad or len(mutated) == ends[whole]


def test_our_frames_are_those_of_tensorflow(tmp_path):
    records = [b"", b"a", bytes(5_000), np.random.default_rng(1).bytes(70_000)]
    write_shard(tmp_path / "0", records)
    assert (tmp_path / "0").read_bytes() == b"".join(map(tfrecord.frame, records))
    assert [r for _, r in tfrecord.records(ShardFile(f"{tmp_path}/0"))] == records


def test_a_tfrecord_can_be_read_on_from_any_offset_it_gave(tmp_path):
    records = [b"%d" % n for n in range(10)]
    write_shard(tmp_path / "0", records)
    for end, record in list(tfrecord.records(ShardFile(f"{tmp_path}/0"))):
        rest = [r for _, r in tfrecord.records(ShardFile(f"{tmp_path}/0", end))]
        assert rest == records[int(record) + 1 :]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_tars_of_every_kind_are_read_from_any_offset(tmp_path, tar_format):
    names = ["a/000", "a/001", "long/" * 28 + "x", "ünicode", "b/002"]
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tar_format) as file:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name in names:
            for extension in ("jpg", "Seg.PNG"):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(name)
                file.addfile(info, io.BytesIO(name.encode()))
    found = list(tar.samples(ShardFile(str(path))))
    assert [sample.key for sample in found] == names
    for number, sample in enumerate(found):
        content = names[number].encode()[: len(names[number])]  # as many bytes as characters
        assert sample.files == {"jpg": content, "seg.png": content}
        rest = list(tar.samples(ShardFile(str(path), sample.end)))
        assert [each.key for each in rest] == names[number + 1 :]


def test_a_mutated_sample_of_a_tar_costs_no_other(tmp_path):
    random = np.random.default_rng(0)
    samples = {
        f"{n:03d}": {"jpg": random.bytes(int(random.integers(1, 900))), "txt": b"caption %d" % n}
        for n in range(RECORDS)
    }
    path = tmp_path / "0.tar"
    write_tar(path, samples)
    content = path.read_bytes()
    starts = [0, *(sample.end for sample in tar.samples(ShardFile(str(path))))]
    for _ in range(1_000):
        hits = random.choice(RECORDS, 4, replace=False)
        mutated = content
        for hit in hits:
            mutated = mutate(random, mutated, starts[hit], starts[hit + 1])
        whole = RECORDS
        if random.random() < 0.2:
            whole = int(max(hits))
            mutated = mutated[: int(random.integers(starts[whole], starts[whole + 1]))]
        path.write_bytes(mutated)
        found = {s.key: s.files for s in tar.samples(ShardFile(str(path))) if s.fault is None}
        for number, (key, files) in enumerate(samples.items()):
            if number not in hits and number < whole:
                assert found[key] == files


def test_mutated_pictures_and_captions_never_break_the_pipeline(tmp_path):
    random = np.random.default_rng(0)
    pixels = photograph(24, 30)
    kinds = [("JPEG", {}), ("PNG", {}), ("GIF", {"mode": "P"}), ("WEBP", {}), ("BMP", {})]
    pictures = [encode(pixels, kind, **options) for kind, options in kinds]
    records, sound = [], set()
    for n in range(2_800):
        picture, caption = pictures[n % 5], b"caption %d" % n
        if n % 4 == 0:
            sound.add(n)
        elif n % 4 == 1:
            picture = mutate(random, picture, 0, len(picture))
        elif n % 4 == 2:
            picture = picture[: int(random.integers(len(picture)))]
        else:
            caption = random.bytes(int(random.integers(12)))
        records.append(example(jpg=picture, txt=caption))
    write_shard(tmp_path / "0", records)
    config = default_config().data
    source = open_source(f"{tmp_path}/0", config)
    row = RowFunction(source, config, 8)
    fields = {
        "record": tf.constant(records),
        "draws": tf.zeros([len(records), DRAWS]),
        "ticket": tf.range(len(records), dtype=tf.int64),
    }
    rows = tf.data.Dataset.from_tensor_slices(fields).map(row.traced, 2, True).ignore_errors()
    delivered = {int(r["ticket"]): r["caption"] for r in rows.as_numpy_iterator()}
    assert sound <= delivered.keys()
    assert all(delivered[n] == b"caption %d" % n for n in sound)
    dropped = [n for n in range(len(records)) if n not in delivered]
    assert len(dropped) > 300
    for n in dropped[::20]:  # and each has a reason
        assert row.examine({"record": records[n]}) is not None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG"])
def test_a_decompression_bomb_is_refused_by_its_header(kind, tmp_path):
    picture = bytearray(encode(photograph(20, 20), kind, mode="P" if kind == "GIF" else "RGB"))
    size = (60_000).to_bytes(4, "big")
    if kind == "PNG":
        picture[16:24] = size * 2
    elif kind == "GIF":
        picture[6:10] = size[:1:-1] * 2
    elif kind == "BMP":
        picture[18:26] = size[::-1] * 2
    else:
        at = picture.index(b"\xff\xc0")
        picture[at + 5 : at + 9] = size[2:] * 2
    config = default_config().data
    record = example(jpg=bytes(picture), txt=b"a")
    write_shard(tmp_path / "0", [record])
    row = RowFunction(open_source(f"{tmp_path}/0", config), config, 8)
    fault = row.examine({"record": record})
    assert fault.kind == "huge_image"
    assert "60000 x 60000" in fault.reason


def test_storage_that_fails_for_a_while_is_asked_again(tmp_path, monkeypatch):
    write_shard(tmp_path / "0", [b"a", b"b"])
    waited, failures = [], iter([True, True, True])

    class Stumbling(tf.io.gfile.GFile):
        def read(self, n=-1):
            if next(failures, False):
                raise tf.errors.UnavailableError(None, None, "503")
            return super().read(n)

    monkeypatch.setattr(tf.io.gfile, "GFile", Stumbling)
    monkeypatch.setattr(reading.time, "sleep", waited.append)
    assert [r for _, r in tfrecord.records(ShardFile(f"{tmp_path}/0"))] == [b"a", b"b"]
    assert waited == list(reading.WAITS[:3])


def test_a_shard_that_vanished_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(tf.errors.NotFoundError):
        ShardFile(f"{tmp_path}/gone").peek(1)


def test_faults_are_logged_now_and_then_and_counted_always(caplog, monkeypatch):
    faults = Faults(0.5)
    for n in range(100):
        faults.report("shard", str(n), Fault("empty_image", "nothing"))
    assert faults.counts() == {"empty_image": 100}
    assert sum("empty_image" in record.getMessage() for record in caplog.records) <= 1
