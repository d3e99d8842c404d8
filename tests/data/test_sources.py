"""Specs: what they name, and what a wrong one is told."""

import csv
import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from clip_jax.config import default_config
from clip_jax.data import glyphs
from clip_jax.data.paths import expand_paths
from clip_jax.data.rows import features_of
from clip_jax.data.sources import open_mixture, open_source
from clip_jax.errors import DataError
from tests.data.records import (
    TinyCaptions,
    TinyImages,
    TinyPairs,
    example,
    prepare,
    write_pairs,
    write_shard,
    write_tar,
)


@pytest.fixture
def config():
    return default_config().data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where `tiny_pairs` and `tiny_captions` are prepared, in four shards to a split."""
    directory = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPairs, TinyCaptions):
        prepare(builder, directory, shards=4)
    return str(directory)


@pytest.fixture
def folder(tmp_path):
    """A folder of empty files."""
    for name in ("a0", "a1", "a2", "a10", "b0", "b1", "c_x", "c_y", "001", "002", "003"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a0", ["a0"]),
        ("{001..003}", ["001", "002", "003"]),
        ("a{0..2}", ["a0", "a1", "a2"]),
        ("a{2..2}", ["a2"]),
        ("a{1,0}", ["a1", "a0"]),  # as they are written
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("c_{x,y}", ["c_x", "c_y"]),
        ("a?", ["a0", "a1", "a2"]),
        ("c_*", ["c_x", "c_y"]),
        ("{b,c_}[0x]", ["b0", "c_x"]),
    ],
)
def test_patterns_name_files_in_order(folder, pattern, names):
    assert expand_paths(f"{folder}/{pattern}") == [f"{folder}/{name}" for name in names]


def test_commas_separate_patterns_but_not_within_braces(folder):
    spec = f"{folder}/b{{1,0}},{folder}/a{{0..1}},{folder}/c_*"
    names = ["b1", "b0", "a0", "a1", "c_x", "c_y"]
    assert expand_paths(spec) == [f"{folder}/{name}" for name in names]


def test_numbers_keep_their_digits(tmp_path):
    for name in ("08", "09", "10", "8", "9"):
        (tmp_path / name).touch()
    assert expand_paths(f"{tmp_path}/{{08..10}}") == [f"{tmp_path}/{n}" for n in ("08", "09", "10")]
    assert expand_paths(f"{tmp_path}/{{8..10}}") == [f"{tmp_path}/{n}" for n in ("8", "9", "10")]


@pytest.mark.parametrize("pattern", ["d*", "d", "a{0..3}", "{a,d}0"])
def test_a_pattern_without_a_match_is_named(folder, pattern):
    missing = {"a{0..3}": "a3", "{a,d}0": "d0"}.get(pattern, pattern)
    with pytest.raises(DataError) as caught:
        expand_paths(f"{folder}/b0,{folder}/{pattern}")
    assert f"no shard matches {folder}/{missing} " in str(caught.value)
    assert pattern in str(caught.value).partition("(of config.data.train")[2]


def test_a_range_that_counts_backwards_is_refused():
    with pytest.raises(DataError, match=r"\{9\.\.0\} counts backwards in '/shards/\{9\.\.0\}\.tf'"):
        expand_paths("/shards/{9..0}.tf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(folder):
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0)
    try:
        with pytest.raises(DataError, match="closed"):
            expand_paths(f"{folder}/closed/*")
    finally:
        (folder / "closed").chmod(0o700)


def test_a_file_system_that_cannot_be_listed_is_named():
    with pytest.raises(DataError, match=r"cannot list nosuch://bucket/\*: .*nosuch"):
        expand_paths("nosuch://bucket/*")


def test_an_error_while_listing_is_passed_on_with_the_path(monkeypatch):
    def refuse(path):
        raise tf.errors.PermissionDeniedError(None, None, "not yours")

    monkeypatch.setattr(tf.io.gfile, "glob", refuse)
    with pytest.raises(DataError, match=r"cannot list /closed/\*: not yours"):
        expand_paths("/closed/*")


@pytest.mark.parametrize("spec", [None, ""])
def test_no_spec_is_told_what_to_set(config, spec):
    with pytest.raises(DataError, match=r"set config\.data\.train to tfds:NAME:SPLIT, to shards"):
        open_source(spec, config)


def all_features(source):
    """The features of every record, in the order of the files."""
    found = []
    for shard in range(len(source.shards)):
        for record in source.read(shard, 0, 0):
            assert record.fault is None
            features = features_of(source, record.fields)
            features["captions"] = features["captions"][features.pop("weights") > 0]
            found.append({key: value.numpy() for key, value in features.items()})
    return found


def captions(source):
    return [[text.decode() for text in f["captions"]] for f in all_features(source)]


def test_shards_of_img2dataset_are_read_as_they_are(config, tmp_path):
    spec = write_pairs(tmp_path, (2, 1))
    source = open_source(spec, config)
    assert source.spec == spec
    assert source.shards == [f"{tmp_path}/00000.tfrecord", f"{tmp_path}/00001.tfrecord"]
    assert captions(source) == [[f"photograph number {n}"] for n in range(3)]
    assert all(f["image"].startswith(b"\x89PNG") for f in all_features(source))


def test_the_names_of_the_features_can_be_set(config, tmp_path):
    write_shard(tmp_path / "0", [example(picture=b"pixels", words=b"some words", txt=b"others")])
    config.image_field, config.captions = "picture", ("words", "txt")
    source = open_source(f"{tmp_path}/0", config)
    (features,) = all_features(source)
    assert features["image"] == b"pixels"
    assert captions(source) == [["some words", "others"]]
    config.captions = "text"
    with pytest.raises(DataError, match=r"no example has a caption 'text', only picture, txt"):
        open_source(f"{tmp_path}/0", config)
    config.image_field = "jpg"
    with pytest.raises(DataError, match=r"no example has a picture \(jpg\), only picture"):
        open_source(f"{tmp_path}/0", config)


def test_tars_hold_captions_labels_and_class_names(config, tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    files = {"webp": b"pixels", "txt": b"text", "cls": b"1"}
    write_tar(tmp_path / "0.tar", {"a.b/c": files, "c.d/e": files})
    source = open_source(f"{tmp_path}/0.tar", config)
    assert source.label_names == ("cat", "dog")
    assert captions(source) == [["text"]] * 2
    assert [f["label"] for f in all_features(source)] == [1, 1]


def test_the_key_of_a_sample_ends_at_the_first_dot_of_the_name(config, tmp_path):
    write_tar(tmp_path / "0.tar", {"a/b.c": {"webp": b"pixels", "txt": b"text"}})
    with pytest.raises(DataError, match=r"no sample has a picture .*, only c\.txt, c\.webp"):
        open_source(f"{tmp_path}/0.tar", config)
    config.image_field, config.captions = "c.webp", "c.txt"
    assert captions(open_source(f"{tmp_path}/0.tar", config)) == [["text"]]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (None, ["text"]),
        ("json/alt", ["one", "two"]),
        (("txt", "json/deep/er"), ["text", "three"]),
        ({"json/nothing": 0.5, "txt": 0.5}, ["text"]),
    ],
)
def test_captions_of_a_tar_are_chosen_by_field(config, tmp_path, fields, expected):
    json = b'{"alt": ["one", "two"], "deep": {"er": "three"}}'
    files = {"webp": b"pixels", "txt": b"text", "json": json, "cls": b"1"}
    write_tar(tmp_path / "0.tar", {"a/b": files, "a/c": files})
    config.captions = fields
    source = open_source(f"{tmp_path}/0.tar", config)
    assert captions(source) == [expected] * 2
    assert [f["label"] for f in all_features(source)] == [1, 1]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.jsonl", "tabs.csv"])
def test_tables_name_files_beside_them(config, tmp_path, name):
    (tmp_path / "images").mkdir()
    texts = ["plain", 'with "quotes", commas and ünicode', "b"]
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(b"%d" % n)
    if name.endswith("jsonl"):
        lines = [
            json.dumps({"file": f"images/{n}.png", "captions": [texts[n], "x"]}) for n in range(3)
        ]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter="," if name == "pairs.csv" else "\t")
            writer.writerow(["filepath", "title", "label"])
            writer.writerows([f"images/{n}.png", texts[n], "ab"[n % 2]] for n in range(3))
    source = open_source(f"{tmp_path}/{name}", config)
    extra = ["x"] if name.endswith("jsonl") else []
    assert captions(source) == [[text, *extra] for text in texts]
    assert [f["image"] for f in all_features(source)] == [b"0", b"1", b"2"]
    if extra == []:
        assert source.label_names == ("a", "b")
        assert [f["label"] for f in all_features(source)] == [0, 1, 0]
    config.captions = "nothing"
    with pytest.raises(DataError, match="has no column 'nothing', only"):
        open_source(f"{tmp_path}/{name}", config)


def test_a_folder_of_class_folders_has_labels(config, tmp_path):
    for n, name in enumerate(["dog", "cat", "cat"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{n}.JPG").write_bytes(b"%d" % n)
    source = open_source(str(tmp_path), config)
    assert source.label_names == ("cat", "dog")
    assert not source.has_captions
    assert [(f["image"], f["label"]) for f in all_features(source)] == [
        (b"1", 0),
        (b"2", 0),
        (b"0", 1),
    ]


def test_a_folder_of_pictures_has_captions_beside_them(config, tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.jpg").write_bytes(b"%d" % n)
    (tmp_path / "1.txt").write_text("one")
    assert captions(open_source(str(tmp_path), config)) == [[], ["one"]]


def test_numbered_folders_of_img2dataset_have_captions_beside_them(config, tmp_path):
    for n, name in enumerate(["00000", "00001", "00001"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{n}.jpg").write_bytes(b"%d" % n)
        (tmp_path / name / f"{n}.txt").write_text(f"caption {n}")
    source = open_source(str(tmp_path), config)
    assert captions(source) == [["caption 0"], ["caption 1"], ["caption 2"]]
    assert source.label_names is None


def test_a_folder_of_shards_is_what_its_shards_are(config, tmp_path):
    write_pairs(tmp_path / "a", (2, 1))
    assert len(captions(open_source(f"{tmp_path}/a", config))) == 3


def test_a_folder_without_pictures_is_refused(config, tmp_path):
    with pytest.raises(DataError, match=r"neither pictures .* nor folders of them"):
        open_source(str(tmp_path), config)


def test_sources_are_mixed_by_weight_each_with_its_captions(config, tmp_path):
    one, other = write_pairs(tmp_path / "a", (2,)), write_pairs(tmp_path / "b", (3,))
    mixture = open_mixture([(one, 1), (other, 3, "key")], config)
    assert mixture.weights == (0.25, 0.75)
    assert captions(mixture.sources[1])[2] == ["000000002"]
    assert mixture.spec == f"0.25 {one} + 0.75 {other}"
    together = open_mixture([one, other], config)
    assert together.weights == (1.0,)
    assert len(captions(together.sources[0])) == 5
    for wrong in ([(one, 0)], [(one,)], [one, (other, 1)], 5):
        with pytest.raises(DataError, match=r"expected|neither"):
            open_mixture(wrong, config)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.parquet"])
def test_formats_that_are_not_read_are_named(config, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"expected \.tar, TFRecord"):
        open_source(f"{tmp_path}/{name}", config)


def test_a_data_set_of_tfds_is_read_with_its_pictures_encoded(config, data_dir):
    config.data_dir = data_dir
    source = open_source("tfds:tiny_pairs:train", config)
    assert len(source.shards) == len(source.counts) == 4
    assert sum(source.counts) == 10
    assert source.label_names == ("even", "odd")
    found = all_features(source)
    assert len(found) == 10
    for features in found:
        number = int(features["captions"][0].decode().removeprefix("number "))
        assert features["label"] == number % 2
        pixels = tf.io.decode_png(features["image"]).numpy()
        np.testing.assert_array_equal(pixels, np.full((4, 4, 3), number))


def test_a_data_set_of_tfds_may_be_backed_by_array_records(config, tmp_path):
    builder = TinyPairs(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    config.data_dir = str(tmp_path)
    source = open_source("tfds:tiny_pairs:train[2:9]", config)
    assert source.shards[0].endswith("array_record-00000-of-00001")
    expected = [
        [builder_caption.decode()]
        for builder_caption in (e["caption"] for e in builder.as_data_source(split="train[2:9]"))
    ]
    assert captions(source) == expected
    (last,) = list(source.read(0, 6, 6))  # a seek, as in resuming
    assert features_of(source, last.fields)["captions"].numpy()[0].decode() == expected[6][0]


@pytest.mark.parametrize(
    "split",
    ["train[:10%]", "train[:3]", "train[4:7]", "train[-2:]", "train[50%:]", "train+test"],
)
def test_a_part_of_a_split_holds_the_records_that_tfds_reads(config, data_dir, split):
    config.data_dir = data_dir
    source = open_source(f"tfds:tiny_pairs:{split}", config)
    builder = tfds.builder("tiny_pairs", data_dir=data_dir)
    expected = [e["caption"] for e in builder.as_dataset(split=split).as_numpy_iterator()]
    assert captions(source) == [[text.decode()] for text in expected]
    assert sum(source.counts) == len(expected)
    assert len(source.counts) == len(source.shards)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("tfds:tiny_pairs", "names no split; write tfds:tiny_pairs:train"),
        ("tfds:tiny_pairs:", "names no split; write tfds:tiny_pairs:train"),
        ("tfds:no_such_set:train", "knows no data set 'no_such_set', nor is there one in "),
        ("tfds:Not a name:train", "'tfds:Not a name:train': "),
        ("tfds:tiny_images:train", r"tiny_images is not prepared in .*`tfds build tiny_images`"),
        ("tfds:tiny_pairs:validation", "has the splits (train, test|test, train): .*validation"),
        ("tfds:tiny_pairs:train[:x]", "has the splits (train, test|test, train): "),
        ("tfds:tiny_pairs:train[:0]", r"'tfds:tiny_pairs:train\[:0\]' holds no example"),
        ("tfds:tiny_captions:train", "no feature `image`, only .*caption"),
    ],
)
def test_a_spec_that_tfds_cannot_answer_is_explained(config, data_dir, spec, complaint):
    config.data_dir = data_dir
    with pytest.raises(DataError, match=complaint) as caught:
        open_source(spec, config)
    assert len(str(caught.value)) < 1000  # not the whole catalogue


def test_an_unprepared_data_set_is_told_where_it_was_looked_for(config, tmp_path):
    config.data_dir = str(tmp_path)
    assert TinyImages.name == "tiny_images"
    with pytest.raises(DataError, match=r"config\.data\.data_dir") as caught:
        open_source("tfds:tiny_images:train", config)
    assert str(tmp_path) in str(caught.value)


def test_another_file_format_is_refused(config, tmp_path):
    builder = prepare(TinyPairs, tmp_path, shards=1)
    info = pathlib.Path(builder.data_path, "dataset_info.json")
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    config.data_dir = str(tmp_path)
    with pytest.raises(DataError, match="only TFRecord and ArrayRecord can be read"):
        open_source("tfds:tiny_pairs:train", config)


def test_without_a_data_dir_the_glyphs_go_where_tfds_keeps_its_data(
    config, data_dir, tmp_path, monkeypatch
):
    asked = []

    def record(directory):
        asked.append(directory)
        return tfds.builder("tiny_pairs", data_dir=data_dir)

    monkeypatch.setattr(glyphs, "prepare", record)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    open_source("tfds:glyphs:train", config)
    config.data_dir = "elsewhere"
    open_source("tfds:glyphs:train", config)
    assert asked == [str(tmp_path), "elsewhere"]
