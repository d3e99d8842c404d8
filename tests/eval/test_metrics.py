"""Every metric against scikit-learn and against brute force, ties included."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from clip_jax.eval.metrics import (
    any_hit_at_k,
    binary_statistics,
    bootstrap,
    calibration,
    classification_statistics,
    everything,
    hit_at_k,
    mean_per_class,
    multilabel_statistics,
    retrieval_statistics,
)

SEEDS = st.integers(0, 10_000)


def hit_by_counting(scores, target, k):
    """The share of all orders of equal scores in which the target is among the first k."""
    hits = []
    for row, t in zip(scores, target, strict=True):
        higher = sum(score > row[t] for score in row)
        equal = sum(score == row[t] for score in row)
        hits.append(sum(place < k for place in range(higher, higher + equal)) / equal)
    return np.array(hits)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 7), st.integers(1, 10))
def test_hits_equal_counting_ties_included(seed, rows, classes, k):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 3, (rows, classes)).astype(float)  # many ties
    target = random.integers(0, classes, rows)
    np.testing.assert_allclose(hit_at_k(scores, target, k), hit_by_counting(scores, target, k))


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(0, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 6))
def test_any_hit_equals_the_share_of_all_orders_of_ties(seed, higher, tied, own, k):
    del seed
    orders = set(itertools.permutations([True] * own + [False] * tied))
    places = max(k - higher, 0)
    expected = np.mean([any(order[:places]) for order in orders])
    found = any_hit_at_k(*(np.array([count]) for count in (higher, tied, own)), k)
    np.testing.assert_allclose(found, [expected])


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_accuracies_equal_scikit_learns_where_nothing_ties(seed):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(40, 7))
    target = random.integers(0, 7, 40)
    found = everything(classification_statistics(scores, target), 40)
    chosen = scores.argmax(axis=1)
    top5 = sk.top_k_accuracy_score(target, scores, k=5, labels=np.arange(7))
    assert found["acc1"] == pytest.approx(sk.accuracy_score(target, chosen))
    assert found["acc5"] == pytest.approx(top5)
    assert found["mean_acc1_acc5"] == pytest.approx((found["acc1"] + top5) / 2)
    assert found["mean_per_class_recall"] == pytest.approx(
        sk.recall_score(target, chosen, average="macro", labels=np.unique(target))
    )


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_roc_auc_equals_scikit_learns_ties_and_weights_included(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, (30, 2)).astype(float)
    target = random.integers(0, 2, 30)
    target[:2] = 0, 1
    weights = random.integers(0, 4, 30).astype(float)
    weights[:2] = 1
    statistic = binary_statistics(scores, target)["roc_auc"]
    ranked = scores[:, 1] - scores[:, 0]
    assert statistic(np.ones(30)) == pytest.approx(sk.roc_auc_score(target, ranked))
    expected = sk.roc_auc_score(target, ranked, sample_weight=weights)
    assert statistic(weights) == pytest.approx(expected)


def average_precision_11_points(scores, target):
    """As the devkit of VOC2007 has it, over thresholds."""
    points = []
    for recall in range(11):
        best = 0.0
        for threshold in np.unique(scores):
            found = scores >= threshold
            true = np.sum(target[found])
            if 10 * true >= recall * target.sum():
                best = max(best, true / found.sum())
        points.append(best)
    return np.mean(points)


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_average_precisions_equal_scikit_learns_and_the_devkits_ties_included(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 8, (25, 3)).astype(float)
    target = random.integers(-1, 2, (25, 3))
    target[0] = 1
    found = everything(multilabel_statistics(scores, target), 25)
    areas, points = [], []
    for c in range(3):
        counted = target[:, c] >= 0
        of_class = scores[counted, c], target[counted, c]
        areas.append(sk.average_precision_score(of_class[1], of_class[0]))
        points.append(average_precision_11_points(*of_class))
    assert found["mean_average_precision"] == pytest.approx(np.mean(areas))
    assert found["mean_average_precision_11_points"] == pytest.approx(np.mean(points))


def test_a_model_that_scores_all_alike_gets_chance():
    metrics = everything(classification_statistics(np.zeros((50, 10)), np.arange(50) % 10), 50)
    assert metrics["acc1"] == pytest.approx(0.1)
    assert metrics["acc5"] == pytest.approx(0.5)


def test_the_mean_over_classes_weighs_rare_ones_alike_and_leaves_out_absent_ones():
    scores = np.eye(6)[[0, 0, 0, 1, 3]]  # predictions
    metrics = everything(classification_statistics(scores, np.array([0, 0, 0, 0, 3])), 5)
    assert metrics["acc1"] == pytest.approx(4 / 5)
    assert metrics["mean_per_class_recall"] == pytest.approx((3 / 4 + 1) / 2)


def test_captions_of_pictures_weigh_in_recall_by_their_number():
    owner = np.array([0, 0, 0, 1])
    hit, miss = (0, 0, 1), (99, 0, 1)
    counts = {
        "text": tuple(np.array(c) for c in zip(hit, miss, strict=True)),
        "image": tuple(np.array(c) for c in zip(hit, miss, hit, miss, strict=True)),
    }
    found = everything(retrieval_statistics(counts, owner, 2), 2)
    assert found["text_retrieval_recall@1"] == pytest.approx(1 / 2)
    assert found["image_retrieval_recall@5"] == pytest.approx(2 / 4)


def test_the_bootstrap_interval_of_a_share_is_the_binomials():
    hits = np.zeros(400)
    hits[:120] = 1
    statistics = {"share": lambda weights: float(weights @ hits / weights.sum())}
    low, high = bootstrap(statistics, 400)["share"]
    error = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - error, abs=0.01)
    assert high == pytest.approx(0.3 + error, abs=0.01)
    assert bootstrap(statistics, 400) == bootstrap(statistics, 400)


def test_weights_mean_how_often_an_example_was_drawn():
    random = np.random.default_rng(0)
    scores, target = random.normal(size=(20, 6)), random.integers(0, 6, 20)
    weights = random.integers(0, 3, 20)
    drawn = np.repeat(np.arange(20), weights)
    once = classification_statistics(scores[drawn], target[drawn])
    for name, statistic in classification_statistics(scores, target).items():
        assert statistic(weights.astype(float)) == pytest.approx(once[name](np.ones(len(drawn))))
    hits = random.random(20)
    assert mean_per_class(hits, target, weights.astype(float)) == pytest.approx(
        mean_per_class(hits[drawn], target[drawn], np.ones(len(drawn)))
    )


def test_calibration_of_one_who_knows_what_he_knows_is_perfect():
    random = np.random.default_rng(0)
    probability = random.uniform(0.2, 1.0, 20_000)
    right = (random.random(20_000) < probability).astype(float)
    confidence, accuracy, size, error = calibration(probability, right)
    assert size.sum() == 20_000
    np.testing.assert_allclose(confidence, accuracy, atol=0.05)
    assert error < 0.02
    assert calibration(np.full(10, 0.9), np.zeros(10))[3] == pytest.approx(0.9)
