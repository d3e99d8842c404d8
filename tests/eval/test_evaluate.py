"""Evaluation of small sets: against plain loops, on every mesh and batch size, and its mistakes."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.errors import ConfigError, DataError
from clip_jax.eval import Encoder, Options, evaluate, evaluators
from clip_jax.eval.registry import PLAIN_TEMPLATE
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import replicate
from tests.eval import one_process
from tests.eval.tiny import made, mesh_of_one, model
from tests.hosts import run_as_hosts

CLASSES = ["blue star", "green circle", "red square"]
QUICK = Options(intervals=False)


def picture(index):
    return np.random.default_rng(index).integers(0, 256, (18, 20, 3), np.uint8)


def write(path, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(index)).save(path)


def captions(index):
    return [f"picture {index} {'x' * each}" for each in range(1 + index % 3)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Class folders with a train and a test split, and captioned pictures."""
    directory = tmp_path_factory.mktemp("data")
    for split, first, count in (("train", 1000, 30), ("test", 0, 19)):
        for index in range(first, first + count):
            name = CLASSES[index % 3].replace(" ", "_")
            write(directory / "shapes" / split / name / f"{index:04d}.png", index)
    rows = []
    for index in range(19):
        write(directory / "pairs" / f"{index}.png", index)
        quoted = ", ".join(f'"{caption}"' for caption in captions(index))
        rows.append(f'{{"file": "{index}.png", "captions": [{quoted}]}}\n')
    (directory / "pairs" / "test.jsonl").write_text("".join(rows))
    return directory


def encoder(mesh, batch_size=64):
    return Encoder(replicate(model(), mesh), Preprocess(16), mesh, batch_size)


@pytest.fixture
def one_device():
    return mesh_of_one()


@pytest.fixture(scope="module")
def by_plain_loops():
    """Accuracy and recalls, one picture and one prompt at a time, through the public interface."""
    clip, preprocess = model(), Preprocess(16)
    encode_image = jax.jit(lambda clip, image: clip.encode_image(image, normalize=True))
    encode_text = jax.jit(lambda clip, tokens: clip.encode_text(tokens, normalize=True))

    def text(sentence):
        tokens = clip_jax.tokenize(sentence, context_length=32)
        return np.asarray(encode_text(clip, tokens))[0]

    images = np.stack([
        np.asarray(encode_image(clip, preprocess(Image.fromarray(picture(index)))[None]))[0]
        for index in range(19)
    ])  # fmt: skip
    weights = np.stack([text(PLAIN_TEMPLATE.format(name)) for name in CLASSES])
    accuracy = np.mean((images @ weights.T).argmax(axis=1) == np.arange(19) % 3)
    texts = [(index, text(caption)) for index in range(19) for caption in captions(index)]
    owner = np.array([index for index, _ in texts])
    scores = images @ np.stack([vector for _, vector in texts]).T
    found = [any(owner[best] == i for best in np.argsort(-scores[i])[:5]) for i in range(19)]
    image = [owner[t] in np.argsort(-scores[:, t])[:5] for t in range(len(owner))]
    return accuracy, np.mean(found), np.mean(image)


def test_results_equal_plain_loops_on_every_mesh(mesh, data_dir, by_plain_loops):
    check(encoder(mesh, 8), data_dir, by_plain_loops)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_results_equal_plain_loops_for_every_batch_size(
    one_device, batch_size, data_dir, by_plain_loops
):
    check(encoder(one_device, batch_size), data_dir, by_plain_loops)


def check(ready, data_dir, by_plain_loops):
    accuracy, text, image = by_plain_loops
    shapes = evaluate(ready, "shapes", tasks=["zero_shot"], data_dir=str(data_dir), options=QUICK)
    assert shapes["zero_shot"].metrics["acc1"] == pytest.approx(accuracy)
    assert shapes["zero_shot"].examples == 19
    pairs = evaluate(ready, "pairs", data_dir=str(data_dir), options=QUICK)["retrieval"].metrics
    assert pairs["text_retrieval_recall@5"] == pytest.approx(text)
    assert pairs["image_retrieval_recall@5"] == pytest.approx(image)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(data_dir):
    alone = one_process.results(jax.devices()[:4], data_dir)
    assert len(alone["metrics"]) >= 8
    assert [len(ranks[0]) for ranks in alone["ranks"].values()] == [31, 55]
    for found in run_as_hosts(one_process.__file__, 2, data_dir):
        assert found == alone


def test_texts_cut_to_their_length_are_embedded_as_whole_ones(one_device):
    texts = ["a", "a photo of a cat.", "word " * 100, "a " * 20]
    whole = clip_jax.tokenize(texts, 32, truncate=True)
    expected = model().encode_text(whole, normalize=True)
    np.testing.assert_allclose(encoder(one_device).texts(texts), expected, atol=1e-5)


def test_class_vectors_are_means_over_names_and_templates_and_are_kept(one_device, monkeypatch):
    from clip_jax.eval.registry import ClassName

    ready = encoder(one_device)
    classes, templates = [ClassName(("happy", "smiling")), ClassName(("sad",))], ("a {}", "the {}")
    vectors = ready.class_vectors(classes, templates)
    four = ready.texts(["a happy", "the happy", "a smiling", "the smiling"]).mean(axis=0)
    np.testing.assert_allclose(vectors[0], four / np.linalg.norm(four), atol=1e-6)
    monkeypatch.setattr(ready, "texts", None)  # nothing is encoded twice
    np.testing.assert_array_equal(ready.class_vectors(classes[::-1], templates), vectors[::-1])


def test_names_and_templates_can_be_given_in_the_folder_or_instead(one_device, data_dir, tmp_path):
    ready = encoder(one_device)
    keywords = {"tasks": ["zero_shot"], "data_dir": str(data_dir), "options": QUICK}

    def probabilities(**more):
        found = evaluate(ready, "shapes", **keywords, **more)["zero_shot"].predictions
        return found.names, found.probabilities

    (tmp_path / "names").write_text("rouge | red_square\nvert | green_circle\nbleu | blue star\n")
    (tmp_path / "templates").write_text("un {}\n")
    names, found = probabilities(
        classnames=str(tmp_path / "names"), templates=str(tmp_path / "templates")
    )
    assert names == ["rouge", "vert", "bleu"]
    other_names, other = probabilities()
    assert other_names == CLASSES
    assert np.abs(found[:, ::-1] - other).max() > 1e-3
    (tmp_path / "names").write_text("rouge | red square\n")
    with pytest.raises(DataError, match="examples of classes that are not to choose from: blue"):
        probabilities(classnames=str(tmp_path / "names"))
    (tmp_path / "names").write_text("rouge | red square\nviolet\n")
    with pytest.raises(DataError, match="'violet' is missing"):
        probabilities(classnames=str(tmp_path / "names"))


def test_unreadable_pictures_are_counted_and_left_out(one_device, data_dir, tmp_path):
    for index in range(9):
        write(tmp_path / "broken" / "test" / CLASSES[index % 3] / f"{index}.png", index)
    whole = (tmp_path / "broken" / "test" / CLASSES[0] / "0.png").read_bytes()
    for name, content in (("a.png", b""), ("b.png", b"no picture"), ("c.png", whole[:300])):
        (tmp_path / "broken" / "test" / CLASSES[0] / name).write_bytes(content)
    outcome = evaluate(encoder(one_device, 4), "broken", data_dir=str(tmp_path), options=QUICK)
    assert outcome["zero_shot"].examples == 9
    assert outcome["zero_shot"].unreadable == 3


def test_bad_input_is_answered_with_what_was_expected(one_device, data_dir, tmp_path):
    ready = encoder(one_device)

    def ask(name, directory=tmp_path, **more):
        return evaluate(ready, name, data_dir=str(directory), **more)

    with pytest.raises(DataError, match=r"no data set 'shape'; looked for .*shape/.*glyphs"):
        ask("shape", data_dir)
    with pytest.raises(
        DataError, match=r"(?s)food101/.*wds_food101/.*tfds:food101.*tfds build food"
    ):
        ask("food101")
    with pytest.raises(DataError, match=r"looked for .*birdsnap/.*wds_birdsnap.*thomasberg"):
        ask("birdsnap")
    with pytest.raises(DataError, match="no task 'probe'; there are: zero_shot"):
        ask("shapes", data_dir, tasks=["probe"])
    with pytest.raises(DataError, match="no captions, which retrieval needs"):
        ask("shapes", data_dir, tasks=["retrieval"])
    with pytest.raises(DataError, match="no labels"):
        ask("pairs", data_dir, tasks=["zero_shot"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture in folders of classes"):
        ask("empty")
    write(tmp_path / "gap" / "test" / "cat" / "0.png", 0)
    (tmp_path / "gap" / "test" / "dog").mkdir()
    with pytest.raises(DataError, match="no picture of 1 of its 2 classes: dog"):
        ask("gap")
    with pytest.raises(DataError, match="has no split 'train'"):
        ask("gap", tasks=["linear_probe"])
    write(tmp_path / "rotten" / "test" / "cat" / "0.png", 0)
    (tmp_path / "rotten" / "test" / "cat" / "0.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of its 1 pictures can be read"):
        ask("rotten")
    ready.model = made()
    ready.model.text = None
    with pytest.raises(ConfigError, match="no text tower, which zero_shot needs"):
        ask("shapes", data_dir, tasks=["zero_shot"])


def test_a_configured_set_that_does_not_exist_is_refused_before_training(small_config):
    small_config.eval.datasets = ("glyps",)
    with pytest.raises(DataError, match="no data set 'glyps'"):
        evaluators(small_config)


def test_a_web_dataset_folder_of_the_registry_is_scored_with_its_names(one_device, tmp_path):
    import tarfile

    from clip_jax.eval.registry import datasets

    names = [each.prompts[0] for each in datasets()["eurosat"].classes][::-1]
    folder = tmp_path / "wds_vtab-eurosat"
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for index in range(20):
            file = io.BytesIO()
            Image.fromarray(picture(index)).save(file, "PNG")
            for suffix, content in (("png", file.getvalue()), ("cls", str(index % 10).encode())):
                info = tarfile.TarInfo(f"s{index}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = evaluate(
        encoder(one_device), "eurosat", tasks=["zero_shot"], data_dir=str(tmp_path), options=QUICK
    )["zero_shot"].predictions
    assert [found.names[each] for each in found.target[:10]] == names
