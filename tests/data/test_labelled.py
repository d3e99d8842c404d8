"""Evaluation sets in every form that users hold, written by the test itself."""

import io
import json
import tarfile
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from clip_jax.data.labelled import open_folder
from clip_jax.data.labelled_tfds import open_tfds
from clip_jax.errors import DataError


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def value(example):
    """The grey of a picture: which one it is."""
    return int(np.asarray(Image.open(io.BytesIO(example.image())))[0, 0, 0])


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_classes(folder, counts):
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            (folder / name / f"{number}.png").write_bytes(png(number))
            number += 1


def opened(folder, split="test"):
    return open_folder(epath.Path(folder), split)


def test_class_folders(tmp_path):
    write_classes(tmp_path / "train", {"dog": 1, "cat": 2})
    write_classes(tmp_path / "test", {"dog": 2, "cat": 1})
    source = opened(tmp_path)
    assert source.label_names == ("cat", "dog")
    assert source.sizes == (1, 2)
    assert [(e.label, value(e)) for e in source.examples()] == [(0, 2), (1, 0), (1, 1)]
    assert [e.label for e in opened(tmp_path, "train").examples()] == [0, 0, 1]
    assert opened(tmp_path, "validation") is None


def test_folders_without_splits_are_the_test(tmp_path):
    write_classes(tmp_path, {"a": 1, "b": 1})
    assert len(list(opened(tmp_path).examples())) == 2
    assert opened(tmp_path, "train") is None


def test_val_is_the_test_where_there_is_no_other_and_then_validates_nothing(tmp_path):
    write_classes(tmp_path / "train", {"a": 1, "b": 1})
    write_classes(tmp_path / "val", {"a": 2, "b": 1})
    assert len(list(opened(tmp_path).examples())) == 3
    assert opened(tmp_path, "validation") is None


def test_clip_benchmarks_web_dataset_folders(tmp_path):
    test = tmp_path / "test"
    write_tar(test / "0.tar", [("s0.webp", png(0)), ("s0.cls", b"1"), ("s1.png", png(1)),
                               ("s1.cls", b"0")])  # fmt: skip
    write_tar(test / "1.tar", [("s2.cls", b"1"), ("s2.jpg", png(2))])
    (test / "nshards.txt").write_text("2\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = opened(tmp_path)
    assert source.label_names == ("cat", "dog")
    assert [(e.label, value(e)) for e in source.examples()] == [(1, 0), (0, 1), (1, 2)]


def test_web_datasets_of_captions_and_of_several_labels(tmp_path):
    labels = io.BytesIO()
    np.save(labels, np.array([0, 1, 1]))
    write_tar(tmp_path / "test" / "0.tar", [
        ("a.jpg", png(0)), ("a.txt", "one\ntwö\n".encode()),
        ("b.jpg", png(1)), ("b.npy", labels.getvalue()),
    ])  # fmt: skip
    (tmp_path / "test" / "nshards.txt").write_text("1")
    first, second = opened(tmp_path).examples()
    assert first.captions == ("one", "twö")
    np.testing.assert_array_equal(second.label, [0, 1, 1])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_tables(tmp_path, suffix):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [
        {"file": "0.png", "label": "dog", "age": "3"},
        {"file": "1.png", "label": "cat", "age": "4"},
    ]
    if suffix == "csv":
        text = "file,label,age\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"test.{suffix}").write_text(text)
    source = opened(tmp_path)
    assert source.label_names == ("cat", "dog")
    found = [(value(e), e.label, e.attributes["age"]) for e in source.examples()]
    assert found == [(0, 1, "3"), (1, 0, "4")]


def test_several_captions_of_a_picture_in_the_only_table_of_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "captions": ["x", "y"]}\n')
    (example,) = opened(tmp_path).examples()
    assert example.captions == ("x", "y")
    assert example.label is None


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "holds no picture in folders of classes"),
        (lambda d: (d / "test" / "cat").mkdir(parents=True), "holds no picture in folders"),
        (lambda d: (d / "test.csv").write_text("file,label\n"), "holds no row"),
        (lambda d: (d / "test.csv").write_text("a,b\n1,2\n"), "should be in one called file"),
        (lambda d: (d / "test.jsonl").write_text("{oops\n"), "test.jsonl, line 1"),
        (lambda d: [(d / f"{n}.csv").write_text("") for n in "ab"], "holds several tables"),
    ],
)  # fmt: skip
def test_folders_that_are_none_of_this_say_what_was_expected(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_damaged_web_datasets_say_where(tmp_path):
    shards = tmp_path / "test" / "nshards.txt"
    write_tar(tmp_path / "test" / "0.tar", [("a.jpg", png(0)), ("a.cls", b"one")])
    shards.write_text("many")
    with pytest.raises(DataError, match="should hold a number"):
        opened(tmp_path)
    shards.write_text("3")
    with pytest.raises(DataError, match=r"missing: 1.tar, 2.tar"):
        opened(tmp_path)
    shards.write_text("1")
    with pytest.raises(DataError, match=r"0.tar:/a: .cls should hold the number"):
        list(opened(tmp_path).examples())
    content = (tmp_path / "test" / "0.tar").read_bytes()
    (tmp_path / "test" / "0.tar").write_bytes(content[:700])
    with pytest.raises(DataError, match=r"0.tar cannot be read"):
        list(opened(tmp_path).examples())
    write_tar(tmp_path / "test" / "0.tar", [("a.txt", b"no picture")])
    with pytest.raises(DataError, match="but no picture"):
        list(opened(tmp_path).examples())


@pytest.mark.parametrize(
    ("name", "split", "labels", "shape"),
    [
        ("voc/2007", "test", "voc", (20,)),
        ("kitti", "test", "closest_vehicle_distance", ()),
        ("clevr", "validation[:3]", "count_objects", ()),
        ("ucf101/ucf101_1", "test", "middle_frame", ()),
        ("cifar10", "test", "", ()),
    ],
)
def test_derived_labels_in_the_true_features_of_tfds(tmp_path, name, split, labels, shape):
    """The builder's own features, with made-up contents, read as prepared data would be."""
    builder = tfds.builder(name, data_dir=str(tmp_path))
    random = np.random.default_rng(0)
    made = [_made_up(builder.info.features, random, name) for _ in range(4)]
    source = _stand_in(builder, split, made, labels, tmp_path)
    examples = list(source.examples())
    assert len(examples) == (3 if "[" in split else 4)
    for example in examples:
        assert np.shape(example.label) == shape
        picture = np.asarray(Image.open(io.BytesIO(example.image())))
        # TFDS shuffles what it writes: which one is it? VOC's are JPEGs, not equal to a pixel.
        away = [np.abs(picture.astype(int) - _shown(one)).mean() for one in made]
        assert sorted(away)[0] < 60 < sorted(away)[1]
        expected = made[int(np.argmin(away))]
        _check_label(name, example.label, expected, source)


def _shown(made):
    return made["video"][2] if "video" in made else made["image"]


def _made_up(features, random, name):
    picture = random.integers(0, 256, (256, 256, 3), np.uint8)
    if name == "voc/2007":
        return {"image": picture, "image/filename": "x", "objects": [], "labels": [2, 5, 7],
                "labels_no_difficult": [5]}  # fmt: skip
    if name == "kitti":
        depths = random.uniform(1, 40, 2)
        return {"image": picture, "image/file_name": "x", "objects": [
            {"type": kind, "truncated": 0.0, "occluded": 0, "alpha": 0.0,
             "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "dimensions": np.zeros(3, np.float32),
             "location": np.array([0, 0, depth], np.float32), "rotation_y": 0.0}
            for kind, depth in zip(("Car", "Pedestrian"), depths, strict=True)]}  # fmt: skip
    if name == "clevr":
        count = int(random.integers(3, 11))
        thing = {"color": "gray", "material": "rubber", "shape": "cube", "size": "small",
                 "rotation": 0.0, "3d_coords": np.zeros(3, np.float32),
                 "pixel_coords": np.zeros(3, np.float32)}  # fmt: skip
        things = [thing] * count
        return {"image": picture, "file_name": "x", "question_answer": [], "objects": things}
    if name.startswith("ucf101"):
        frames = random.integers(0, 256, (5, 256, 256, 3), np.uint8)
        return {"video": frames, "label": int(random.integers(0, 101))}
    return {"id": "x", "image": picture[:32, :32], "label": int(random.integers(0, 10))}


def _stand_in(builder, split, made, labels, directory):
    base = split.partition("[")[0]
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    generate = {base: ((str(n), example) for n, example in enumerate(made))}
    # Else TFDS looks for the file through importlib_resources, which it does not install.
    type(builder).code_path = epath.Path(__file__)
    with mock.patch.object(type(builder), "_split_generators", return_value=generate):
        builder.download_and_prepare(download_config=config)
    name = builder.info.full_name.rpartition("/")[0]
    source = open_tfds(name, split, str(directory), labels)
    assert source is not None
    return source


def _check_label(name, label, made, source):
    if name == "voc/2007":
        assert [int(each) for each in np.flatnonzero(label)] == [2, 5, 7]
        assert label[5] == 1
        assert label[2] == label[7] == -1
    elif name == "kitti":
        thresholds = [-100.0, 8.0, 20.0, 999.0]  # VTAB's, and its way to use them
        depth = made["objects"][0]["location"][2]  # of the car; the pedestrian does not count
        assert label == max(i for i, t in enumerate(thresholds) if t < depth)
    elif name == "clevr":
        assert source.label_names[label] == str(len(made["objects"]))
    else:
        assert label == made["label"]
