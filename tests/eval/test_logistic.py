"""Logistic regression in JAX against scikit-learn's, on every mesh; and the sweep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.errors import DataError
from clip_jax.eval import logistic
from clip_jax.eval.tasks.few_shot import equivalent_shots
from clip_jax.eval.tasks.linear_probe import GRID, stratified, sweep


def made_up(examples=130, width=6, classes=4, seed=0):
    random = np.random.default_rng(seed)
    target = random.integers(0, classes, examples)
    features = random.normal(size=(examples, width)) + 1.5 * np.eye(classes, width)[target]
    return features.astype(np.float32), target


def objective(linear, features, target, strength):
    logits = linear.scores(features.astype(np.float64))
    top = logits.max(axis=1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(len(target)), target].sum()
    return loss + strength / 2 * np.sum(linear.weights.astype(np.float64) ** 2)


def test_it_is_scikit_learns_on_every_mesh_however_the_rows_are_chunked(mesh, monkeypatch):
    monkeypatch.setattr(logistic, "_CHUNK", 8)  # several chunks a device
    features, target = made_up()
    found = logistic.fit(logistic.put(features, target, mesh), 4, 0.7, mesh)
    reference = logistic.fit_sklearn(features, target, 4, 0.7)
    ours, theirs = (objective(each, features, target, 0.7) for each in (found, reference))
    assert ours == pytest.approx(theirs, rel=1e-4)
    np.testing.assert_allclose(found.weights, reference.weights, atol=0.02)
    scores, expected = found.scores(features), reference.scores(features)
    np.testing.assert_array_equal(scores.argmax(axis=1), expected.argmax(axis=1))


@pytest.fixture
def one_device():
    import jax

    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e3, 1e6])
def test_strengths_from_one_end_of_the_sweep_to_the_other(one_device, strength):
    features, target = made_up(seed=1)
    found = logistic.fit(logistic.put(features, target, one_device), 4, strength, one_device)
    reference = logistic.fit_sklearn(features, target, 4, strength)
    ours, theirs = (objective(each, features, target, strength) for each in (found, reference))
    assert ours <= theirs * (1 + 1e-3)


def test_two_classes_are_those_of_scikit_learn(one_device):
    """Ours has two columns and half the penalty on their difference, so the strength is doubled."""
    features, target = made_up(classes=2, width=4)
    found = logistic.fit(logistic.put(features, target, one_device), 2, 2.0, one_device)
    reference = logistic.fit_sklearn(features, target, 2, 1.0)
    difference, expected = (
        each.scores(features)[:, 1] - each.scores(features)[:, 0] for each in (found, reference)
    )
    np.testing.assert_allclose(difference, expected, atol=0.02)


def test_several_labels_are_a_regression_each_and_minus_one_does_not_count(one_device):
    random = np.random.default_rng(0)
    features, kind = made_up(classes=3)
    target = (np.eye(3, dtype=int)[kind] | (random.random((130, 3)) < 0.2)).astype(int)
    target[random.random(target.shape) < 0.1] = -1
    found = logistic.fit(logistic.put(features, target, one_device), 3, 0.5, one_device)
    reference = logistic.fit_sklearn(features, target, 3, 0.5)
    np.testing.assert_allclose(found.scores(features), reference.scores(features), atol=0.03)


def test_a_class_without_examples_is_never_chosen_by_either(one_device):
    features, target = made_up(classes=3)
    target = np.where(target == 1, 3, target)  # no 1
    placed = logistic.put(features, target, one_device)
    for linear in (logistic.fit(placed, 4, 1.0, one_device),
                   logistic.fit_sklearn(features, target, 4, 1.0)):  # fmt: skip
        assert not np.any(linear.scores(features).argmax(axis=1) == 1)


@given(st.integers(0, 96))
def test_the_sweep_finds_any_single_peak_with_few_fits(peak):
    asked = []

    def score(strength):
        asked.append(strength)
        return -abs(np.log10(strength) - np.log10(GRID[peak]))

    found, tried = sweep(score)
    assert found == peak
    assert len(asked) == len(set(asked)) == len(tried) <= 15


def test_of_equals_the_sweep_takes_the_strongest_penalty():
    found, _ = sweep(lambda strength: 0.5)
    assert GRID[found] == pytest.approx(1e6)
    assert len(GRID) == 97  # 96 steps, 8 a decade


def test_held_out_examples_are_a_share_of_every_class_and_always_the_same():
    target = np.repeat([0, 1, 2], [50, 10, 1])
    marked = stratified(target, 0.2)
    np.testing.assert_array_equal(np.bincount(target[marked], minlength=3), [10, 2, 0])
    np.testing.assert_array_equal(marked, stratified(target, 0.2))
    with pytest.raises(DataError, match="too few to hold some out"):
        stratified(np.array([0, 1]), 0.2)


def test_equivalent_shots_are_interpolated_in_the_logarithm():
    shots, scores = np.array([1.0, 2.0, 4.0, 16.0, 300.0]), np.array([0.2, 0.4, 0.3, 0.6, 0.8])
    assert equivalent_shots(0.4, shots, scores) == pytest.approx(2)
    assert equivalent_shots(0.3, shots, scores) == pytest.approx(2**0.5)
    assert equivalent_shots(0.5, shots, scores) == pytest.approx(8)  # the dip at 4 is smoothed
    assert equivalent_shots(0.1, shots, scores) == 0.0
    assert equivalent_shots(0.9, shots, scores) == float("inf")
