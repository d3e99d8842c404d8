import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.eval.metrics import classification_metrics, hit_at_k, retrieval_metrics


def hit_by_counting(scores, target, k):
    """The share of all orders of equal scores in which the target is among the first k."""
    hits = []
    for row, t in zip(scores, target, strict=True):
        higher = sum(score > row[t] for score in row)
        equal = sum(score == row[t] for score in row)
        hits.append(sum(place < k for place in range(higher, higher + equal)) / equal)
    return np.array(hits)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 7), st.integers(1, 10))
def test_hits_equal_counting_ties_included(seed, rows, classes, k):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 3, (rows, classes)).astype(float)  # many ties
    target = random.integers(0, classes, rows)
    np.testing.assert_allclose(hit_at_k(scores, target, k), hit_by_counting(scores, target, k))


def test_a_model_that_scores_all_alike_gets_chance():
    metrics = classification_metrics(np.zeros((50, 10)), np.arange(50) % 10)
    assert metrics["acc1"] == pytest.approx(0.1)
    assert metrics["acc5"] == pytest.approx(0.5)
    same = np.ones((40, 4)) / 2
    assert retrieval_metrics(same, same)["text_retrieval_recall@10"] == pytest.approx(0.25)


def test_the_mean_over_classes_weighs_rare_ones_alike_and_leaves_out_absent_ones():
    scores = np.eye(4)[[0, 0, 0, 1, 3]]  # predictions
    metrics = classification_metrics(scores, np.array([0, 0, 0, 0, 3]))
    assert metrics["acc1"] == pytest.approx(4 / 5)
    assert metrics["mean_per_class_recall"] == pytest.approx((3 / 4 + 1) / 2)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_retrieval_equals_sorting_all_pairs(chunk):
    random = np.random.default_rng(0)
    image, text = random.normal(size=(2, 30, 8))
    text += image
    metrics = retrieval_metrics(image, text, chunk=chunk)
    scores = image @ text.T
    for k in (1, 5, 10):
        best_texts = np.argsort(-scores, axis=1)[:, :k]
        best_images = np.argsort(-scores, axis=0)[:k].T
        for name, best in (("text", best_texts), ("image", best_images)):
            expected = np.mean([row in found for row, found in enumerate(best)])
            assert metrics[f"{name}_retrieval_recall@{k}"] == pytest.approx(expected)
