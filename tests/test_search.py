"""Search in a folder of pictures: by words, by a picture, and copies."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import DataError
from clip_jax.eval import Encoder
from clip_jax.preprocess import Preprocess
from clip_jax.search import build_index, main
from tests.eval.tiny import mesh_of_one, model


@pytest.fixture(scope="module")
def encoder():
    return Encoder(model(), Preprocess(16), mesh_of_one(), 8)


@pytest.fixture
def folder(tmp_path):
    for index in range(12):
        path = tmp_path / ("a" if index % 2 else "b/c") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index % 11).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(path)  # 11 is a copy of 0
    (tmp_path / "note.txt").write_text("no picture")
    (tmp_path / "broken.jpg").write_bytes(b"no picture either")
    return tmp_path


def test_the_index_is_sorted_unit_length_and_says_what_it_left_out(encoder, folder):
    index = build_index(encoder, folder)
    assert len(index.files) == 12
    assert index.unreadable == ("broken.jpg",)
    np.testing.assert_allclose(np.linalg.norm(index.embeddings, axis=1), 1, atol=1e-5)
    saved = np.load(folder / ".clip_jax_index" / "embeddings.npy")
    np.testing.assert_array_equal(saved, index.embeddings)


def test_the_nearest_are_those_of_plain_cosines(encoder, folder):
    index = build_index(encoder, folder)
    query = encoder.texts(["a photo of noise"])[0]
    cosines = {
        file: float(v @ query) for file, v in zip(index.files, index.embeddings, strict=True)
    }
    expected = sorted(cosines, key=lambda file: -cosines[file])[:5]
    found = index.nearest(query, 5)
    np.testing.assert_allclose([c for _, c in found], [cosines[f] for f in expected], atol=1e-6)


def test_copies_are_found_and_nothing_else(encoder, folder, monkeypatch):
    monkeypatch.setattr("clip_jax.search._CHUNK", 5)
    index = build_index(encoder, folder)
    ((first, second, cosine),) = index.duplicates(0.99999)
    assert {first, second} == {"a/11.png", "b/c/00.png"}
    assert cosine == pytest.approx(1)
    assert len(index.duplicates(-1.0)) == 12 * 11 / 2


def test_only_new_and_changed_pictures_are_embedded_again(encoder, folder, monkeypatch):
    before = build_index(encoder, folder)
    embedded = []
    original = encoder.source
    monkeypatch.setattr(
        encoder, "source", lambda s: embedded.extend(e.where for e in s.examples()) or original(s)
    )
    assert build_index(encoder, folder).files == before.files
    assert embedded == []
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "a" / "new.png")
    Image.fromarray(np.ones((30, 9, 3), np.uint8)).save(folder / "a" / "03.png")
    (folder / "a" / "01.png").unlink()
    after = build_index(encoder, folder)
    assert sorted(embedded) == ["a/03.png", "a/new.png"]
    assert set(after.files) == set(before.files) - {"a/01.png"} | {"a/new.png"}
    row = after.files.index("a/05.png")
    np.testing.assert_array_equal(
        after.embeddings[row], before.embeddings[before.files.index("a/05.png")]
    )


def test_what_cannot_be_searched_says_why(encoder, tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        build_index(encoder, tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no picture"):
        build_index(encoder, tmp_path)
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        build_index(encoder, tmp_path)


def test_the_command_prints_the_best_and_draws_a_contact_sheet(
    encoder, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("clip_jax.search.load", lambda _: (encoder.model, encoder.preprocess))
    monkeypatch.setattr("clip_jax.search.load_tokenizer", lambda _, file: None)
    out = tmp_path / "sheet.png"
    main([
        "--model=x", f"--images={folder}", "--text=a photo", f"--like={folder / 'a' / '11.png'}",
        "--duplicates=0.9999", "--top=3", f"--out={out}",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "12 pictures" in printed
    assert "1 could not be read, such as broken.jpg" in printed
    assert "1.000  a/11.png" in printed
    with Image.open(out) as sheet:
        assert sheet.width > 500
    with pytest.raises(SystemExit):
        main(["--model=x", f"--images={folder}"])
    assert "nothing to look for" in capsys.readouterr().err
