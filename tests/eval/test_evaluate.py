"""Evaluation of a tiny labelled set: against plain loops, on every mesh and batch size."""

import io

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from PIL import Image

import clip_jax
from clip_jax.errors import DataError
from clip_jax.eval import DATASETS, evaluate, evaluators
from clip_jax.eval.datasets import EvalDataset
from clip_jax.models import CLIP, CLIPConfig, TextConfig, ViTConfig
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import replicate

COUNT = 37
NAMES = ["red square", "green circle", "blue star", "old house", "new moon"]
TEMPLATES = ("a {}", "a picture of a {}.")
CLASSES = [0, 2, 4]  # the only ones to choose from


def pictures():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (18, 20, 3), np.uint8) for _ in range(COUNT)]


def label(index):
    return CLASSES[index % len(CLASSES)]


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = tfds.core.Path(__file__)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=NAMES),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for index, picture in enumerate(pictures()):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            file.seek(0)
            yield index, {"image": file, "caption": f"picture {index}", "label": label(index)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    TinyShapes(data_dir=directory).download_and_prepare()
    return directory


@pytest.fixture
def tiny_set(monkeypatch):
    entry = EvalDataset(
        source="tfds:tiny_shapes:test",
        tasks=("zero_shot", "retrieval"),
        templates=TEMPLATES,
        classes=lambda names: np.array(CLASSES),
    )
    monkeypatch.setitem(DATASETS, "tiny", entry)


CONFIG = CLIPConfig(
    embed_dim=8,
    vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    text=TextConfig(width=16, heads=2, layers=1, context_length=10),
)


def model():
    return CLIP(CONFIG, rngs=nnx.Rngs(1))


def by_plain_loops():
    """Accuracy and recall, one picture and one prompt at a time, through the public interface."""
    clip, preprocess = model(), Preprocess(16)

    def text(sentence):
        tokens = clip_jax.tokenize(sentence, context_length=10)
        return np.asarray(clip.encode_text(tokens, normalize=True))[0]

    images = [
        np.asarray(clip.encode_image(preprocess(Image.fromarray(p))[None], normalize=True))[0]
        for p in pictures()
    ]
    weights = []
    for name in (NAMES[c] for c in CLASSES):
        mean = np.mean([text(template.format(name)) for template in TEMPLATES], axis=0)
        weights.append(mean / np.linalg.norm(mean))
    right = [
        CLASSES[int(np.argmax(np.stack(weights) @ image))] == label(index)
        for index, image in enumerate(images)
    ]
    texts = np.stack([text(f"picture {index}") for index in range(COUNT)])
    scores = np.stack(images) @ texts.T
    recall = [index in np.argsort(-scores[index])[:5] for index in range(COUNT)]
    return np.mean(right), np.mean(recall)


@pytest.fixture(scope="module")
def expected():
    return by_plain_loops()


@pytest.mark.parametrize("batch_size", [8, 16, 64])
def test_results_equal_plain_loops_on_every_mesh_and_batch_size(
    mesh, batch_size, tiny_set, data_dir, expected
):
    results = evaluate(
        replicate(model(), mesh),
        Preprocess(16),
        mesh,
        dataset="tiny",
        data_dir=data_dir,
        batch_size=batch_size,
    )
    accuracy, recall = expected
    assert results["zero_shot"]["acc1"] == pytest.approx(accuracy)
    assert results["retrieval"]["text_retrieval_recall@5"] == pytest.approx(recall)


def test_unknown_sets_and_tasks_are_answered_with_those_there_are(tiny_set, data_dir, mesh):
    with pytest.raises(DataError, match=r"no evaluation set 'tinny'; there are: .*glyphs"):
        evaluate(model(), Preprocess(16), mesh, dataset="tinny")
    with pytest.raises(DataError, match="no task 'probe'; it has: zero_shot, retrieval"):
        evaluate(model(), Preprocess(16), mesh, dataset="tiny", tasks=["probe"], data_dir=data_dir)


def test_a_configured_set_that_does_not_exist_is_refused_before_training(small_config):
    small_config.eval.datasets = ("glyps",)
    with pytest.raises(DataError, match="no evaluation set 'glyps'"):
        evaluators(small_config)


def test_an_example_outside_the_classes_to_choose_from_is_an_error(monkeypatch, tiny_set, data_dir):
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    narrow = EvalDataset(
        "tfds:tiny_shapes:test", ("zero_shot",), TEMPLATES, lambda _: np.array([0])
    )
    monkeypatch.setitem(DATASETS, "narrow", narrow)
    with pytest.raises(DataError, match="classes that are not to choose from"):
        evaluate(model(), Preprocess(16), mesh, dataset="narrow", data_dir=data_dir)
