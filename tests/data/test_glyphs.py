"""The embedded data set: what is drawn, what it is called, who is held out, and its files."""

import hashlib
import multiprocessing
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets as tfds

from clip_jax.data import glyphs
from clip_jax.data.labelled_tfds import open_tfds
from clip_jax.data.pipeline import pipeline_options

MARGIN = (glyphs.SIZE - glyphs.INK) // 2


def _read(builder):
    """Returns {split: list of examples with NumPy leaves}, in the order of the files."""
    examples = {}
    reading = tfds.ReadConfig(options=pipeline_options())
    for split in ("train", "test"):
        batches = builder.as_dataset(
            split=split, batch_size=1024, read_config=reading
        ).as_numpy_iterator()
        examples[split] = [
            dict(zip(batch, values, strict=True))
            for batch in batches
            for values in zip(*batch.values(), strict=True)
        ]
    return examples


def _digest(examples):
    digest = hashlib.sha256()
    for example in examples:
        for feature in ("image", "caption", "face", "label"):
            value = example[feature]
            digest.update(value if isinstance(value, bytes) else value.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    return glyphs.prepare(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="session")
def examples(builder):
    return _read(builder)


@pytest.fixture(scope="session")
def names(builder):
    return builder.info.features["label"].names


def test_a_face_can_be_the_label(builder):
    source = open_tfds("glyphs", "test[:300]", str(builder.data_dir_root), "face")
    assert source.label_names == tuple(glyphs.FACES)
    found = list(source.examples())
    assert len({example.label for example in found}) == len(glyphs.FACES)
    for example in found:
        (caption,) = example.captions  # "sans mono ..." begins with "sans", too: the longest is it
        fitting = [face for face in glyphs.FACES if caption.startswith(f"{face} ")]
        assert source.label_names[example.label] == max(fitting, key=len)


def test_counts(builder, examples, names):
    # Fonts change little: DejaVu is at 2.37 since 2016. Newer Unicode names may add a few.
    assert 48_000 < len(examples["train"]) < 50_000
    assert 5_000 < len(examples["test"]) < 5_500
    assert 7_300 < len(names) < 7_400
    for split in ("train", "test"):
        assert builder.info.splits[split].num_examples == len(examples[split])
        assert builder.info.splits[split].num_shards == glyphs.NUM_SHARDS
        shards = np.array(builder.info.splits[split].shard_lengths)
        assert shards.max() - shards.min() <= 1


def test_no_character_is_in_both_splits(examples, names):
    train, test = ({int(e["label"]) for e in examples[split]} for split in ("train", "test"))
    assert not train & test
    assert train | test == set(range(len(names)))
    assert 0.09 < len(test) / len(names) < 0.11
    np.testing.assert_array_equal(glyphs.held_out(names), sorted(test))


def test_held_out_characters_do_not_change():
    # Recorded: published scores depend on it.
    text = "".join(map(chr, range(0x20, 0x250)))
    held_out = "".join(filter(glyphs.is_held_out, text))
    assert hashlib.sha256(held_out.encode()).hexdigest()[:16] == "3e2df47147c0095a"


def test_captions_are_face_and_name(examples, names):
    captions = set()
    for example in examples["train"] + examples["test"]:
        caption, face = example["caption"].decode(), example["face"].decode()
        name = names[example["label"]]
        assert face in glyphs.FACES
        assert caption == f"{face} {name}"
        assert caption == caption.lower()
        assert caption.isascii()
        assert caption == caption.strip()
        captions.add(caption)
    assert len(captions) == len(examples["train"]) + len(examples["test"])
    assert {e["face"].decode() for e in examples["test"]} == set(glyphs.FACES)


def test_labels_follow_code_points(names):
    codes = [ord(unicodedata.lookup(name.upper())) for name in names]
    assert codes == sorted(set(codes))
    assert not any(unicodedata.category(chr(code)) in ("Cc", "Co", "Cn") for code in codes)


def test_every_image_has_ink_and_a_centred_bounding_box(examples):
    for split in ("train", "test"):
        images = np.stack([e["image"] for e in examples[split]])
        assert images.shape[1:] == (glyphs.SIZE, glyphs.SIZE, 1)
        assert images.dtype == np.uint8
        ink = images[..., 0] < 255
        assert ink.any((1, 2)).all()
        for axis in (1, 2):
            profile = ink.any(axis)
            first = profile.argmax(-1)
            last = profile.shape[-1] - 1 - profile[:, ::-1].argmax(-1)
            assert first.min() >= MARGIN
            assert last.max() < glyphs.SIZE - MARGIN
            # Faint edges of an outline may round to no ink at all: allow some pixels.
            assert np.abs(first + last - (glyphs.SIZE - 1)).max() <= 6


def test_size_tells_small_from_capital():
    sans = dict(glyphs.render("sans"))

    def height(char):
        return (sans[char] < 255).any(1).sum()

    assert height("x") < height("X")
    assert height("\N{SUPERSCRIPT TWO}") < height("2")
    # Longer than the canvas allows: drawn smaller, just as small as needed.
    assert glyphs.INK - 2 <= height("\N{BOX DRAWINGS LIGHT VERTICAL}") <= glyphs.INK


def test_unmapped_and_blank_characters_are_left_out():
    chars = [char for char, _ in glyphs.render("italic stix")]
    assert chars == sorted(chars)
    assert "a" in chars
    assert " " not in chars
    assert "\N{NO-BREAK SPACE}" not in chars
    assert "\N{TAMIL LETTER A}" not in chars  # would be the box that stands for a missing glyph


def test_faces_differ():
    drawn = {face: dict(glyphs.render(face))["g"].tobytes() for face in glyphs.FACES}
    assert len(set(drawn.values())) == len(drawn) == 16


def test_two_processes_at_once_make_the_same_records(examples, tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=glyphs.prepare, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.name for path in (tmp_path / "glyphs").iterdir()] == ["1.0.0"]
    again = _read(glyphs.prepare(tmp_path))
    assert {split: _digest(again[split]) for split in again} == {
        split: _digest(examples[split]) for split in examples
    }


def test_prepare_reuses_what_is_there_and_is_quiet(builder, capfd, monkeypatch):
    monkeypatch.setattr(glyphs, "render", None)  # a second rendering would fail
    again = glyphs.prepare(builder.data_path.parent.parent)
    assert again.info.splits["test"].num_examples == builder.info.splits["test"].num_examples
    assert again.info.features["label"].names == builder.info.features["label"].names
    assert capfd.readouterr().out == ""


def test_prepare_reports_a_directory_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        glyphs.prepare(tmp_path / "file")
