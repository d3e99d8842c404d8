"""Zero-shot classification: the class whose prompts lie nearest (section 3.1 of the paper)."""

from clip_jax.eval.outcome import Data, Options, Outcome, Predictions, measured, softmax
from clip_jax.eval.tasks.labels import find_targets, statistics_of


def zero_shot(data: Data, options: Options) -> Outcome:
    """Scores the test split; several labels an example are scored by average precision."""
    source, embedded = data.split("test"), data.embedded("test")
    targets = find_targets(data.dataset, source, embedded)
    vectors = data.encoder.class_vectors(targets.entries, data.dataset.entry.templates)
    scores = embedded.image[targets.rows] @ vectors.T
    statistics = statistics_of(scores, targets.target, data.dataset.entry.metric)
    metrics, intervals = measured(statistics, len(scores), options)
    predictions = None
    if targets.target.ndim == 1:
        predictions = Predictions(
            embedded.places[targets.rows],
            targets.target,
            softmax(data.encoder.logit_scale * scores),
            targets.names,
        )
    return Outcome(metrics, intervals, len(scores), embedded.unreadable, targets.notes, predictions)
