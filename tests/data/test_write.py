"""Shards out of any source: complete, resumable, and the same pairs as the source's."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from clip_jax.config import default_config
from clip_jax.data import write as command
from clip_jax.data.rows import features_of
from clip_jax.data.sources import open_source
from clip_jax.errors import DataError
from tests.data.records import TinyPairs, encode, pair, photograph, prepare, write_pairs, write_tar


def contents(spec, **data):
    """Picture, captions and label of every record."""
    config = default_config().data
    config.update(data)
    source = open_source(str(spec), config)
    found = []
    for shard in range(len(source.shards)):
        for record in source.read(shard, 0, 0):
            assert record.fault is None
            features = features_of(source, record.fields)
            texts = features["captions"][features["weights"] > 0].numpy().tolist()
            found.append(
                (
                    features["image"].numpy(),
                    texts,
                    features.get("label", None) and int(features["label"]),
                )
            )
    return found


def run(*arguments):
    command.main([str(each) for each in arguments])


def make_tar(directory):
    write_tar(
        directory / "0.tar",
        {f"{n}": {"png": pair(n)[0], "txt": pair(n)[1], "cls": b"%d" % (n % 2)} for n in range(7)},
    )
    (directory / "classnames.txt").write_text("even\nodd\n")
    return directory / "0.tar"


def make_table(directory):
    rows = []
    for n in range(7):
        (directory / f"{n}.jpg").write_bytes(encode(photograph(20, 20, n), "JPEG"))
        rows.append(json.dumps({"file": f"{n}.jpg", "caption": [f"one {n}", f"two {n}"]}))
    (directory / "pairs.jsonl").write_text("\n".join(rows))
    return directory / "pairs.jsonl"


def make_folder(directory):
    for n in range(7):
        (directory / f"{n}.webp").write_bytes(encode(photograph(20, 20, n), "WEBP"))
        (directory / f"{n}.txt").write_text(f"caption {n}")
    return directory


def make_classes(directory):
    for n in range(7):
        (directory / f"class{n % 3}").mkdir(exist_ok=True)
        (directory / f"class{n % 3}" / f"{n}.gif").write_bytes(
            encode(photograph(20, 20, n), "GIF", mode="P")
        )
    return directory


def make_tfrecords(directory):
    return write_pairs(directory, (3, 4))


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
@pytest.mark.parametrize("make", [make_tar, make_table, make_folder, make_classes, make_tfrecords])
def test_the_shards_hold_what_the_source_holds(tmp_path, make, kind):
    (tmp_path / "in").mkdir()
    source, out = make(tmp_path / "in"), tmp_path / "out"
    run(source, f"--out={out}", f"--format={kind}", "--samples=3", "--workers=2")
    expected = contents(source)
    assert len(expected) == 7
    several = make is make_table and kind == "tar"  # all captions are in the JSON, one in the text
    assert contents(out, captions="json/captions" if several else None) == expected
    if several:
        assert [texts for _, texts, _ in contents(out)] == [t[:1] for _, t, _ in expected]
    index = json.loads((out / "index.json").read_text())
    assert index["format"] == kind
    assert sum(shard["samples"] for shard in index["shards"]) == 7
    for shard in index["shards"]:
        assert (out / shard["name"]).stat().st_size == shard["bytes"]
    names = open_source(str(source), default_config().data).label_names
    assert open_source(str(out), default_config().data).label_names == names
    files = make in (make_table, make_folder, make_classes)
    shards = {make_tfrecords: 2, make_tar: 1}.get(make, 3)
    assert len(index["shards"]) == shards
    assert [shard["samples"] for shard in index["shards"]][:1] == ([3] if files else [7 // shards])


def test_a_tfds_set_becomes_shards(tmp_path):
    prepare(TinyPairs, tmp_path / "tfds", shards=2)
    spec = "tfds:tiny_pairs:train"
    run(spec, f"--data_dir={tmp_path}/tfds", f"--out={tmp_path}/out")
    assert contents(tmp_path / "out") == contents(spec, data_dir=str(tmp_path / "tfds"))


def test_what_is_bad_is_left_out_and_counted(tmp_path, capsys):
    changes = {1: {"jpg": b"no picture"}, 4: {"txt": b""}, 5: {"jpg": b""}}
    spec = write_pairs(tmp_path / "in", (3, 4), changes)
    run(spec, f"--out={tmp_path}/out", "--workers=1")
    assert len(contents(tmp_path / "out")) == 4
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["bad"] for shard in index["shards"]] == [
        {"undecodable_image": 1},
        {"empty_image": 1, "missing_caption": 1},
    ]
    assert capsys.readouterr().out.startswith("4 samples in 2 shards in ")


def test_a_stopped_command_goes_on_and_writes_nothing_twice(tmp_path, monkeypatch):
    spec, out = write_pairs(tmp_path / "in", (3, 4, 5)), tmp_path / "out"
    scan = command.scan

    def stop_in_the_last(source, shards, *arguments, **options):
        for number, record in enumerate(scan(source, shards, *arguments, **options)):
            if shards.start == 2 and number == 2:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(command, "scan", stop_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        run(spec, f"--out={out}", "--workers=1")
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not (out / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    asked = []

    def note(source, shards, *arguments, **options):
        asked.append(shards)
        return scan(source, shards, *arguments, **options)

    monkeypatch.setattr(command, "scan", note)
    run(spec, f"--out={out}", "--workers=1")
    assert asked == [range(2, 3)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(out) == contents(spec)
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))


def test_a_folder_that_another_command_began_is_not_mixed_up(tmp_path):
    spec = write_pairs(tmp_path / "in", (3, 4))
    run(spec, f"--out={tmp_path}/out")
    with pytest.raises(DataError, match="was begun with"):
        run(tmp_path / "in" / "00000.tfrecord", f"--out={tmp_path}/out")
    with pytest.raises(DataError, match="holds other shards"):
        run(spec, f"--out={tmp_path}/in")


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["--out=b"], ["a", "--out=b", "--format=zip"], ["a", "--out=b", "--samples=0"]],
)
def test_bad_arguments_are_answered_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: python -m clip_jax.data.write" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupt_ends_it_at_once_and_the_same_command_finishes(tmp_path):
    picture = pair(0)[0]
    for shard in range(40):
        samples = {f"{n}": {"png": picture, "txt": b"%d" % n} for n in range(100)}
        write_tar(tmp_path / f"{shard:02d}.tar", samples)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "clip_jax.data.write", f"{tmp_path}/*.tar", f"--out={out}"]
    process = subprocess.Popen([*words, "--workers=2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(out.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate(timeout=200)[1]
    assert process.returncode == 130, output
    assert output.strip().endswith("stopped")
    assert "Traceback" not in output
    assert 0 < len(list(out.glob("*.tar"))) < 40
    subprocess.run(words, check=True, timeout=300)
    assert len(contents(out)) == 4_000
