"""Metrics on scores, in plain NumPy; names as CLIP_benchmark has them.

Every metric takes weights of the examples, whole numbers that say how often each was drawn, so that
the bootstrap can ask it again and again without sorting anew.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

REPLICATES = 1000
RECALLS = (1, 5, 10)
Statistic = Callable[[np.ndarray], float]  # weights of the examples -> the metric


def hit_at_k(
    scores: Float[np.ndarray, "N C"], target: Int[np.ndarray, " N"], k: int
) -> Float[np.ndarray, " N"]:
    """Whether the target is among the k highest scores of its row: 1, 0, or a share for ties.

    Equal scores stand in random order, and the expectation is taken: a model that scores all C
    alike gets k/C, not all or nothing.
    """
    own = np.take_along_axis(scores, target[:, None], axis=1)
    higher = np.sum(scores > own, axis=1)
    equal = np.sum(scores == own, axis=1)
    return np.clip((k - higher) / equal, 0.0, 1.0)


def any_hit_at_k(
    higher: Int[np.ndarray, " Q"], tied: Int[np.ndarray, " Q"], own: Int[np.ndarray, " Q"], k: int
) -> Float[np.ndarray, " Q"]:
    """Whether any of a query's own items is among the first k: 1, 0, or a share for ties.

    Args:
        higher: items of others that score above the query's best own item.
        tied: items of others that score as it does.
        own: own items that score as it does; at least one.
        k: how many items are retrieved.

    Returns:
        The probability that, equal scores standing in random order, an own item is retrieved.
    """
    missed = np.ones(len(higher))
    places = k - higher  # that are left for the ties; the chance that others' items fill them all
    for place in range(k):
        left = np.clip(tied - place, 0, None) / np.maximum(tied + own - place, 1)
        missed *= np.where(place < places, left, 1.0)
    return 1.0 - missed


def classification_statistics(
    scores: Float[np.ndarray, "N C"], target: Int[np.ndarray, " N"]
) -> dict[str, Statistic]:
    """Top-1, the mean over the classes of top-1, and, of more than five classes, top-5."""
    top1, top5 = hit_at_k(scores, target, 1), hit_at_k(scores, target, 5)
    statistics: dict[str, Statistic] = {
        "acc1": lambda weights: weighted_mean(top1, weights),
        "mean_per_class_recall": lambda weights: mean_per_class(top1, target, weights),
    }
    if scores.shape[1] > 5:
        statistics["acc5"] = lambda weights: weighted_mean(top5, weights)
        # What the paper reports for Kinetics700.
        statistics["mean_acc1_acc5"] = lambda weights: weighted_mean((top1 + top5) / 2, weights)
    return statistics


def binary_statistics(
    scores: Float[np.ndarray, "N 2"], target: Int[np.ndarray, " N"]
) -> dict[str, Statistic]:
    """Those of two classes: the above, and the area under the ROC curve of the second class."""
    curve = _Ranking(scores[:, 1] - scores[:, 0], target == 1)
    return classification_statistics(scores, target) | {"roc_auc": curve.roc_auc}


def multilabel_statistics(
    scores: Float[np.ndarray, "N C"], target: Int[np.ndarray, "N C"]
) -> dict[str, Statistic]:
    """Mean average precision over the classes: the area, and VOC2007's 11 points.

    Args:
        scores: of every class.
        target: 1 where the class is present, 0 where it is not, -1 where the example does not count
            for the class (VOC's difficult objects).
    """
    columns = range(target.shape[1])
    rankings = [_Ranking(scores[:, c], target[:, c] == 1, target[:, c] >= 0) for c in columns]

    def mean(points: bool) -> Statistic:
        def statistic(weights: np.ndarray) -> float:
            return float(np.nanmean([r.average_precision(weights, points) for r in rankings]))

        return statistic

    return {
        "mean_average_precision": mean(points=False),
        "mean_average_precision_11_points": mean(points=True),
    }


def retrieval_statistics(
    counts: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    owner: Int[np.ndarray, " M"],
    images: int,
) -> dict[str, Statistic]:
    """Recall at 1, 5 and 10 both ways; the bootstrap draws images, each with its captions.

    Args:
        counts: `higher, tied, own` of `any_hit_at_k`, for the queries of "text" retrieval (the
            images) and of "image" retrieval (the texts).
        owner: the image of each text.
        images: their number.
    """
    statistics: dict[str, Statistic] = {}
    texts = np.bincount(owner, minlength=images)

    def recall(hits: np.ndarray, queries: np.ndarray) -> Statistic:
        return lambda weights: float(weights @ hits / (weights @ queries))

    for name, found in counts.items():
        for k in RECALLS:
            hits, queries = any_hit_at_k(*found, k), np.ones(images)
            if name == "image":
                hits = np.bincount(owner, weights=hits, minlength=images)
                queries = texts.astype(np.float64)
            statistics[f"{name}_retrieval_recall@{k}"] = recall(hits, queries)
    return statistics


def weighted_mean(values: Float[np.ndarray, " N"], weights: Shaped[np.ndarray, " N"]) -> float:
    """The mean of the values, each as often as its weight says."""
    return float(weights @ values / weights.sum())


def mean_per_class(
    values: Float[np.ndarray, " N"],
    target: Int[np.ndarray, " N"],
    weights: Shaped[np.ndarray, " N"],
) -> float:
    """The mean over the classes that are present of the mean of their values."""
    counts = np.bincount(target, weights=weights)
    sums = np.bincount(target, weights=weights * values)
    present = counts > 0
    return float((sums[present] / counts[present]).mean())


class _Ranking:
    """Examples in descending order of their scores, equal scores together."""

    def __init__(
        self,
        scores: Float[np.ndarray, " N"],
        positive: Bool[np.ndarray, " N"],
        counted: Bool[np.ndarray, " N"] | None = None,
    ):
        self._order = np.argsort(-scores, kind="stable")
        if counted is not None:
            self._order = self._order[counted[self._order]]
        ranked = scores[self._order]
        self._positive = positive[self._order]
        self._ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))

    def _cumulative(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives at each threshold, from the strictest to the laxest."""
        weights = weights[self._order].astype(np.float64)
        true = np.cumsum(weights * self._positive)[self._ends]
        return true, np.cumsum(weights)[self._ends] - true

    def roc_auc(self, weights: np.ndarray) -> float:
        """Area under the ROC curve, trapezoids for ties; NaN where a class is absent."""
        true, false = (np.append(0.0, counts) for counts in self._cumulative(weights))
        area = np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2)
        return float(area / (true[-1] * false[-1])) if true[-1] * false[-1] else float("nan")

    def average_precision(self, weights: np.ndarray, points: bool) -> float:
        """Sum of precision x step of recall, or the mean at recalls 0, 0.1 ... 1 (VOC2007)."""
        true, false = self._cumulative(weights)
        if not len(true) or not true[-1]:
            return float("nan")
        precision = true / np.maximum(true + false, 1e-300)
        if not points:
            return float(np.sum(np.diff(true, prepend=0.0) * precision) / true[-1])
        best_from = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
        # In whole numbers, so that recall 0.3 of ten positives is reached by the third.
        reached = np.searchsorted(true * 10, np.arange(11) * true[-1])
        return float(best_from[reached].mean())


def everything(statistics: Mapping[str, Statistic], examples: int) -> dict[str, float]:
    """The metrics of all examples, once each."""
    weights = np.ones(examples)
    return {name: statistic(weights) for name, statistic in statistics.items()}


def bootstrap(
    statistics: Mapping[str, Statistic], examples: int, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals: the 2.5th and 97.5th percentiles of the metrics of resampled examples.

    Args:
        statistics: metrics by name.
        examples: how many there are; as many are drawn, with replacement.
        replicates: how often.
        seed: the same one gives the same intervals.
    """
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(replicates):
        rows = random.integers(0, examples, examples)
        weights = np.bincount(rows, minlength=examples).astype(np.float64)
        for name, statistic in statistics.items():
            drawn[name].append(statistic(weights))
    return {
        name: (float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5)))
        for name, values in drawn.items()
    }


def calibration(
    probability: Float[np.ndarray, " N"], right: Float[np.ndarray, " N"], bins: int = 15
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"], Int[np.ndarray, " b"], float]:
    """Confidence against accuracy in equal bins of confidence, empty ones left out.

    Returns:
        Mean confidence, accuracy and size of each bin, and the expected calibration error, the mean
        distance of the two (Guo et al., 2017).
    """
    which = np.minimum((probability * bins).astype(int), bins - 1)
    size = np.bincount(which, minlength=bins)
    used = size > 0
    confidence = np.bincount(which, weights=probability, minlength=bins)[used] / size[used]
    accuracy = np.bincount(which, weights=right, minlength=bins)[used] / size[used]
    error = float(np.sum(size[used] * np.abs(confidence - accuracy)) / len(probability))
    return confidence, accuracy, size[used], error
