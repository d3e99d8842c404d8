"""Few-shot logistic regression, and how many shots zero-shot is worth (figures 6 and 7).

For each number of examples a class, several draws; the strength of the L2 penalty is chosen among
seven, two decades apart, on as many further examples of each class (four at most), as CoOp does.
"""

import numpy as np
from jaxtyping import Float

from clip_jax.errors import DataError
from clip_jax.eval.metrics import everything
from clip_jax.eval.outcome import Data, Options, Outcome
from clip_jax.eval.tasks.labels import statistics_of
from clip_jax.eval.tasks.linear_probe import (
    COARSE,
    GRID,
    Split,
    fitter,
    probe,
    test_split,
    train_and_validation,
)
from clip_jax.eval.tasks.zero_shot import zero_shot

_VALIDATION_SHOTS = 4


def few_shot(data: Data, options: Options) -> Outcome:
    """Accuracy by shots, and the shots a class at which it reaches that of zero-shot.

    Raises:
        DataError: a class with fewer examples than shots and one more to validate.
    """
    metric = data.dataset.entry.metric
    test, names, _, notes = test_split(data)
    if test.target.ndim == 2:
        raise DataError(f"{data.dataset.where} has several labels a picture: no few-shot task")
    train, validation = train_and_validation(data)
    pool = Split(*(np.concatenate(parts) for parts in zip(train, validation, strict=True)))

    def score(split: Split, linear) -> float:
        scores = linear.scores(split.features)
        return everything(statistics_of(scores, split.target, metric), len(scores))[metric]

    by_shots: dict[int, list[float]] = {}
    for shots in options.shots:
        for draw in range(options.draws):
            drawn, rest = _draw(pool, shots, seed=draw)
            fit = fitter(drawn, len(names), options, data.encoder.mesh)
            tried = [fit(float(strength)) for strength in GRID[::COARSE]]
            # Of equals the stronger: with few examples to validate on, many are equal.
            best = max(range(len(tried)), key=lambda i: (score(rest, tried[i]), i))
            by_shots.setdefault(shots, []).append(score(test, tried[best]))
    whole = probe(train, validation, len(names), metric, options, data)
    means: dict[float, float] = {
        shots: float(np.mean(values)) for shots, values in by_shots.items()
    }
    means[len(pool.target) / len(names)] = score(test, whole.linear)
    zero = zero_shot(data, Options(intervals=False)).metrics[metric]
    worth = equivalent_shots(zero, np.array(list(means)), np.array(list(means.values())))

    metrics = {f"few_shot_{metric}@{s}": float(np.mean(v)) for s, v in by_shots.items()}
    intervals = {
        f"few_shot_{metric}@{s}": (min(v), max(v)) for s, v in by_shots.items()
    }  # of the draws: the spread that matters here
    details = {"by_shots": list(means.items()), "zero_shot": zero, "equivalent_shots": worth}
    told = f"zero-shot ({100 * zero:.1f} %) is worth {describe_shots(worth, means)} a class"
    return Outcome(
        metrics,
        intervals,
        len(test.target),
        data.embedded("test").unreadable,
        (*notes, told, f"ranges are of {options.draws} draws"),
        None,
        details,
    )


def equivalent_shots(
    zero_shot: float, shots: Float[np.ndarray, " S"], scores: Float[np.ndarray, " S"]
) -> float:
    """The shots at which the scores reach that of zero-shot, by log-linear interpolation.

    Args:
        zero_shot: its score.
        shots: examples a class, increasing; the last is the whole training set.
        scores: at these.

    Returns:
        0: fewer than the first; infinity: more than the last.
    """
    order = np.argsort(shots)
    shots, scores = shots[order], np.maximum.accumulate(scores[order])
    if zero_shot < scores[0]:
        return 0.0
    if zero_shot > scores[-1]:
        return float("inf")
    after = int(np.searchsorted(scores, zero_shot))
    if after == 0:
        return float(shots[0])
    low, high = scores[after - 1], scores[after]
    share = (zero_shot - low) / (high - low)
    return float(np.exp((1 - share) * np.log(shots[after - 1]) + share * np.log(shots[after])))


def describe_shots(worth: float, means: dict) -> str:
    """The equivalent in words."""
    if worth == 0.0:
        return f"fewer than {min(means):g} examples"
    if worth == float("inf"):
        return f"more than all {max(means):g} examples"
    return f"{worth:.1f} examples"


def _draw(pool: Split, shots: int, seed: int) -> tuple[Split, Split]:
    """So many examples of each class, and at most four others to validate on."""
    random = np.random.default_rng([seed, shots])
    drawn, rest = [], []
    for each in np.unique(pool.target):
        rows = random.permutation(np.flatnonzero(pool.target == each))
        if len(rows) <= shots:
            raise DataError(
                f"class {each} has {len(rows)} training examples, too few for {shots} shots and "
                "one to validate; pass fewer --shots"
            )
        drawn.append(rows[:shots])
        rest.append(rows[shots : shots + min(shots, _VALIDATION_SHOTS)])
    return tuple(  # type: ignore[return-value]
        Split(pool.features[rows], pool.target[rows]) for rows in map(np.concatenate, (drawn, rest))
    )
