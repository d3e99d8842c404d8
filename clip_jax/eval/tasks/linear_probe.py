"""Linear probe by the paper's protocol (section 3.2 and appendix A.3).

Logistic regression on the features of the penultimate layer, L-BFGS, at most 1,000 iterations. The
strength of the L2 penalty is swept over [1e-6, 1e6] in 96 logarithmic steps, coarse first and then
halving the interval around the peak; it is chosen on validation, and the probe is fitted anew on
training and validation together.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.errors import DataError
from clip_jax.eval import logistic
from clip_jax.eval.logistic import Linear
from clip_jax.eval.metrics import everything
from clip_jax.eval.outcome import Data, Options, Outcome, Predictions, measured, softmax
from clip_jax.eval.tasks.labels import find_targets, statistics_of

GRID = np.logspace(-6, 6, 97)  # 8 values a decade
COARSE = 16  # steps of the grid: two decades
HELD_OUT = 0.2  # of the training examples, where there is no validation split


class Split(NamedTuple):
    """Features and the right classes."""

    features: Float[np.ndarray, "N D"]
    target: Int[np.ndarray, "N *labels"]


class Probe(NamedTuple):
    """A chosen and refitted probe."""

    linear: Linear
    strength: float
    tried: dict[float, float]  # strength -> the metric on validation


def linear_probe(data: Data, options: Options) -> Outcome:
    """Fits on train and validation, scores test; metric names have CLIP_benchmark's `lp_`."""
    train, validation = train_and_validation(data)
    test, names, places, notes = test_split(data)
    found = probe(train, validation, len(names), data.dataset.entry.metric, options, data)
    scores = found.linear.scores(test.features)
    statistics = statistics_of(scores, test.target, data.dataset.entry.metric)
    metrics, intervals = measured(statistics, len(scores), options, prefix="lp_")
    predictions = None
    if test.target.ndim == 1:
        predictions = Predictions(places, test.target, softmax(scores), names)
    how = f"L2 strength {found.strength:.3g} of {len(found.tried)} tried, {options.solver} L-BFGS"
    sizes = f"{len(train.target)} to train on, {len(validation.target)} to validate"
    return Outcome(
        metrics,
        intervals,
        len(scores),
        data.embedded("test").unreadable,
        (*notes, how, sizes),
        predictions,
        {"strength": found.strength, "validation": list(found.tried.items())},
    )


def test_split(data: Data) -> tuple[Split, list[str], np.ndarray, tuple[str, ...]]:
    """The test split, the names of the classes, and the places of the examples."""
    embedded = data.embedded("test")
    targets = find_targets(data.dataset, data.split("test"), embedded)
    assert embedded.features is not None
    split = Split(embedded.features[targets.rows], targets.target)
    return split, targets.names, embedded.places[targets.rows], targets.notes


test_split.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest thinks


def train_and_validation(data: Data) -> tuple[Split, Split]:
    """The data set's own split, or a fifth of each class held out of train.

    Raises:
        DataError: there is nothing to train on.
    """

    def split(name: str) -> Split:
        embedded = data.embedded(name)
        targets = find_targets(data.dataset, data.split(name), embedded)
        assert embedded.features is not None
        return Split(embedded.features[targets.rows], targets.target)

    train = split("train")
    if data.dataset.open("validation") is not None:
        return train, split("validation")
    held_out = stratified(train.target, HELD_OUT)
    return _rows(train, ~held_out), _rows(train, held_out)


def probe(
    train: Split, validation: Split, classes: int, metric: str, options: Options, data: Data
) -> Probe:
    """Chooses the strength on validation, and fits on both."""
    fit_train = fitter(train, classes, options, data.encoder.mesh)

    def score(strength: float) -> float:
        scores = fit_train(strength).scores(validation.features)
        found = everything(statistics_of(scores, validation.target, metric), len(scores))
        logging.info("linear probe: strength %.3g, %s %.4f", strength, metric, found[metric])
        return found[metric]

    index, tried = sweep(score)
    both = Split(*(np.concatenate(parts) for parts in zip(train, validation, strict=True)))
    linear = fitter(both, classes, options, data.encoder.mesh)(float(GRID[index]))
    return Probe(linear, float(GRID[index]), tried)


def fitter(split: Split, classes: int, options: Options, mesh: Mesh) -> Callable[[float], Linear]:
    """A function strength -> classifier; the examples are put on the devices once."""
    if options.solver == "sklearn":
        return lambda strength: logistic.fit_sklearn(*split, classes, strength)
    placed = logistic.put(*split, mesh)
    return lambda strength: logistic.fit(placed, classes, strength, mesh)


def sweep(score: Callable[[float], float]) -> tuple[int, dict[float, float]]:
    """Finds the peak over `GRID`: every 16th value first, then halving the steps around the best.

    Of equal scores the stronger penalty wins.

    Args:
        score: strength -> the metric on validation.

    Returns:
        The index of the best strength, and the scores of all that were tried.
    """
    scores: dict[int, float] = {}

    def best(indices) -> int:
        for index in indices:
            if 0 <= index < len(GRID) and index not in scores:
                scores[index] = score(float(GRID[index]))
        return max(scores, key=lambda index: (scores[index], index))

    peak, step = best(range(0, len(GRID), COARSE)), COARSE // 2
    while step:
        peak = best((peak - step, peak + step))
        step //= 2
    return peak, {float(GRID[index]): scores[index] for index in sorted(scores)}


def stratified(target: Int[np.ndarray, "N *labels"], share: float) -> np.ndarray:
    """Marks a share of each class's examples, always the same ones; a class keeps at least one.

    Raises:
        DataError: too few examples to hold any out.
    """
    random = np.random.default_rng(0)
    marked = np.zeros(len(target), bool)
    if target.ndim == 2:
        marked[random.permutation(len(target))[: int(share * len(target))]] = True
    else:
        for each in np.unique(target):
            rows = random.permutation(np.flatnonzero(target == each))
            marked[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    if not marked.any():
        raise DataError(
            f"{len(target)} training examples are too few to hold some out for validation; give a "
            "validation split"
        )
    return marked


def _rows(split: Split, rows: np.ndarray) -> Split:
    return Split(split.features[rows], split.target[rows])
