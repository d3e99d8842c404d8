"""The pass through a whole source: what is counted, named and shown."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clip_jax.config import default_config
from clip_jax.data import inspect as command
from clip_jax.data.scan import scan
from clip_jax.data.sources import open_source
from clip_jax.errors import DataError
from tests.data.records import encode, pair, photograph, write_pairs, write_tar

BOMB = bytearray(encode(photograph(20, 20)))
BOMB[16:24] = (60_000).to_bytes(4, "big") * 2


def samples(count, start=0):
    names = range(start, start + count)
    return {f"{n:03d}": {"png": pair(n)[0], "txt": pair(n)[1]} for n in names}


def rotten(directory):
    """Two tars of which 14 samples are good; and what is bad in them."""
    first, second = samples(10), samples(10, 10)
    first["001"]["png"] = b""
    first["003"]["png"] = b"no picture"
    first["004"]["png"] = bytes(BOMB)
    first["006"]["txt"] = b" \n"
    del first["007"]["png"]
    first["008"]["txt"] = b"caf\xe9"
    first["009"]["txt"] = b"word " * 200_000
    write_tar(directory / "0.tar", first)
    write_tar(directory / "1.tar", second)
    content = (directory / "1.tar").read_bytes()
    (directory / "1.tar").write_bytes(content[: content.index(b"019.png") + 700])
    return {
        "empty_image": 1,
        "undecodable_image": 1,
        "huge_image": 1,
        "missing_caption": 1,
        "missing_image": 1,
        "truncated_shard": 1,
    }


def run(*arguments):
    command.main([str(each) for each in arguments])


def test_everything_is_counted_by_kind_and_drawn(tmp_path, capsys):
    bad = rotten(tmp_path)
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    run(tmp_path / "{0..1}.tar", f"--json={report}", f"--sheet={sheet}")
    found = json.loads(report.read_text())
    assert found["samples"] == 14
    assert found["bad"] == bad
    assert found["repaired"] == {"invalid_utf8": 1, "long_caption": 1}
    assert found["shards"] == 2
    assert json.loads(capsys.readouterr().out) == found
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 6 * 192
    # A picture in each of fourteen places, and a caption below it, and nothing in those behind.
    rows = pixels.reshape(3, 192 + 54, 6, 192, 3).swapaxes(1, 2)
    thumbnails, captions = rows[:, :, :192], rows[:, :, 192:]
    for places in (thumbnails, captions):
        drawn = (places < 255).any((2, 3, 4)).ravel()
        assert drawn.tolist() == [True] * 14 + [False] * 4


def test_a_shard_that_vanishes_is_a_bad_one_and_the_others_are_read(tmp_path):
    spec = write_pairs(tmp_path, (3, 4, 5))
    source = open_source(spec, default_config().data)
    (tmp_path / "00001.tfrecord").unlink()
    report, pictures = command.inspect(source, 10**6)
    assert report["samples"] == 8
    assert report["bad"] == {"unreadable_shard": 1}
    assert [picture.caption for picture in pictures[:4]] == [
        f"photograph number {n}" for n in (0, 1, 2, 7)
    ]


def test_the_sheet_shows_pictures_from_all_over(tmp_path):
    picture = pair(0)[0]
    write_tar(
        tmp_path / "0.tar", {f"{n}": {"png": picture, "txt": b"%d" % n} for n in range(1_000)}
    )
    _, pictures = command.inspect(open_source(f"{tmp_path}/0.tar", default_config().data), 10**6)
    numbers = [int(picture.caption) for picture in pictures]
    assert 12 <= len(numbers) <= 24
    assert len(set(np.diff(numbers))) == 1
    assert numbers[-1] > 900


def test_labels_are_shown_by_their_names(tmp_path):
    for name in ("shoe", "hat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(pair(0)[0])
    report, pictures = command.inspect(open_source(str(tmp_path), default_config().data), 10**6)
    assert [picture.caption for picture in pictures] == ["hat", "shoe"]
    assert report["labels"] == 2


def test_a_scan_keeps_the_order_and_names_what_is_bad(tmp_path):
    rotten(tmp_path)
    source = open_source(f"{tmp_path}/{{0..1}}.tar", default_config().data)

    def row(fields):
        features = source.parse(fields)
        with tf.control_dependencies([tf.io.decode_image(features["image"])]):
            return {"length": tf.strings.length(features["image"])}

    found = list(scan(source, [1, 0], row, 10**6, 4))
    assert [record.key for record in found] == [f"{n:03d}" for n in [*range(10, 20), *range(10)]]
    assert [r.values.get("length") for r in found[:9]] == [len(pair(n)[0]) for n in range(10, 19)]
    assert found[9].fault.kind == "truncated_shard"
    assert all(record.shard.endswith("1.tar") for record in found[:10])


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--no-such-flag"]])
def test_bad_arguments_are_answered_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: python -m clip_jax.data.inspect" in capsys.readouterr().err


def test_a_source_that_is_not_there_is_explained_in_a_line(tmp_path):
    with pytest.raises(DataError, match="no shard matches"):
        run(tmp_path / "*.tar")


@pytest.mark.slow
def test_as_a_process_it_ends_with_a_message_and_a_status(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax.data.inspect", f"{tmp_path}/*.tar"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("DataError: no shard matches")
