"""What a task gets and what it gives."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clip_jax.eval.embed import Embedded, Encoder
from clip_jax.eval.logistic import Solver
from clip_jax.eval.metrics import Statistic, bootstrap, everything
from clip_jax.eval.opening import OpenDataset


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen beside the data set and the task.

    Attributes:
        intervals: also 95 % bootstrap intervals; the training loop does without.
        solver: of linear probes.
        shots: examples a class for few-shot.
        draws: of few-shot examples.
        categories: a file of categories for the bias report, or "paper" for the paper's.
    """

    intervals: bool = True
    solver: Solver = "jax"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = 3
    categories: str | None = None


@dataclasses.dataclass
class Data:
    """A data set, and a model to embed it with; each split is embedded once.

    Attributes:
        features: whether some task needs those of the penultimate layer.
    """

    dataset: OpenDataset
    encoder: Encoder
    features: bool = False

    def __post_init__(self):
        self.embedded = functools.cache(self._embedded)
        self.split = functools.cache(self.dataset.split)

    def _embedded(self, split: str) -> Embedded:
        return self.encoder.source(self.split(split), self.features)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a classifier said of each example: for confusion matrices and pictures.

    Attributes:
        places: of the examples in their source.
        target: the right class.
        probabilities: of all classes, float32.
        names: of the classes.
    """

    places: Int[np.ndarray, " N"]
    target: Int[np.ndarray, " N"]
    probabilities: Float[np.ndarray, "N C"]
    names: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        metrics: shares of one by CLIP_benchmark's names.
        intervals: of some of them, 95 %.
        examples: that were scored.
        unreadable: pictures that could not be read and were left out.
        notes: for people.
        predictions: of a classifier.
        details: plain data for figures and reports.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    examples: int
    unreadable: int = 0
    notes: tuple[str, ...] = ()
    predictions: Predictions | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Task = Callable[[Data, Options], Outcome]


def measured(
    statistics: Mapping[str, Statistic], examples: int, options: Options, prefix: str = ""
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The metrics and, where asked for, their intervals."""
    named = {f"{prefix}{name}": statistic for name, statistic in statistics.items()}
    intervals = bootstrap(named, examples) if options.intervals else {}
    return everything(named, examples), intervals


def softmax(logits: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Probabilities of logits, float32."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
