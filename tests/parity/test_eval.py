"""Results of clip_jax.eval against CLIP_benchmark's: the same weights and pictures, every example.

Of zero-shot classification its logits are compared, because its accuracy does not run under NumPy
2.4; its linear probes train on CUDA only, and ours are compared with scikit-learn's in
tests/eval/test_logistic.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from clip_jax.eval import Encoder, Options, evaluate
from clip_jax.eval.opening import find
from clip_jax.preprocess import Preprocess
from tests.eval.tiny import mesh_of_one
from tests.parity.programs import (
    SMALL,
    built,
    numpy_state,
    our_arrays,
    our_config,
    their_model,
    theirs,
    torch,
)

benchmark = pytest.importorskip(
    "clip_benchmark.metrics", reason="needs clip-benchmark: pip install -e '.[parity]'"
)
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval  # noqa: E402

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data"
CONFIG = SMALL["vit"] | {
    "text_cfg": SMALL["vit"]["text_cfg"] | {"vocab_size": 49_408, "context_length": 77}
}
PLAIN = Options(intervals=False)


@pytest.fixture(scope="module")
def model():
    return their_model(CONFIG)


@pytest.fixture(scope="module")
def encoder(model):
    config = our_config(CONFIG)
    ours = built(config, our_arrays(config, numpy_state(model)))
    return Encoder(ours, Preprocess(32), mesh_of_one(), 64)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder of class folders, and one of captioned pictures: blots of random colours."""
    root = tmp_path_factory.mktemp("made_up")
    random = np.random.default_rng(0)

    def draw(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = random.integers(33, 80, 2)
        blots = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        blots.resize(tuple(size.tolist())).save(path, quality=95)

    for name in ("dog", "cat", "maple tree", "red car", "violin", "harbour", "bridge"):
        for number in range(17):
            draw(root / "things" / "test" / name / f"{number}.jpg")
    lines = []
    for number in range(40):
        draw(root / "scenes" / f"{number}.jpg")
        captions = [f"scene {number} seen {way}" for way in ("once", "twice", "again")]
        lines.append(json.dumps({"file": f"{number}.jpg", "captions": captions}))
    (root / "scenes" / "test.jsonl").write_text("\n".join(lines))
    return {"classes": (root, "things"), "captions": (root, "scenes")}


@pytest.fixture(params=["made up", "photographs"])
def place(request, made_up):
    """What is asked for -> the directory and the name of a data set."""
    if request.param == "made up":
        return made_up
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"the photographs of clothing and coco_cc are not at {PHOTOGRAPHS}")
    return {"classes": (PHOTOGRAPHS, "clothing"), "captions": (PHOTOGRAPHS, "coco_cc")}


class Examples(torch.utils.data.Dataset):
    """Our examples as CLIP_benchmark takes them."""

    def __init__(self, source, classes, say):
        self.examples, self.classes, self._say = list(source.examples()), classes, say
        self._transform = theirs.transform.image_transform(32, is_train=False)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        example = self.examples[index]
        path = Path(example.where)
        with Image.open(path) as picture:
            return self._transform(picture), self._say(example)


def test_zero_shot_is_clip_benchmarks_to_the_last_example(model, encoder, place):
    directory, name = place["classes"]
    (found,) = find(name, str(directory))
    names = [entry.prompts[0] for entry in found.entry.classes]
    examples = Examples(found.split("test"), names, lambda example: example.label)
    templates = [template.replace("{}", "{c}") for template in found.entry.templates]
    classifier = zeroshot_classification.zero_shot_classifier(
        model, theirs.tokenize, names, templates, "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(
        model, classifier, torch.utils.data.DataLoader(examples, 32), "cpu", amp=False
    )
    outcome = evaluate(encoder, name, tasks=["zero_shot"], data_dir=str(directory), options=PLAIN)[
        "zero_shot"
    ]
    predictions = outcome.predictions
    np.testing.assert_array_equal(predictions.target, target)
    np.testing.assert_array_equal(predictions.probabilities.argmax(1), logits.argmax(1))
    expected = {
        "acc1": sklearn.metrics.accuracy_score(target, logits.argmax(1)),
        "acc5": sklearn.metrics.top_k_accuracy_score(target, logits, k=5),
        "mean_per_class_recall": sklearn.metrics.balanced_accuracy_score(target, logits.argmax(1)),
    }
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    assert {name: outcome.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_retrieval_is_clip_benchmarks_to_the_last_example(model, encoder, place):
    directory, name = place["captions"]
    (found,) = find(name, str(directory))
    examples = Examples(found.split("test"), [], lambda example: list(example.captions))
    loader = torch.utils.data.DataLoader(examples, 16, collate_fn=lambda rows: (
        torch.stack([row[0] for row in rows]), [row[1] for row in rows]))  # fmt: skip
    expected = zeroshot_retrieval.evaluate(
        model, loader, theirs.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    metrics = evaluate(encoder, name, tasks=["retrieval"], data_dir=str(directory), options=PLAIN)[
        "retrieval"
    ].metrics
    assert len(expected) == 6
    for metric, value in expected.items():
        assert metrics[metric] == pytest.approx(value, abs=1e-6), metric
