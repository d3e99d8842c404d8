"""The evaluation sets by name: data, no code."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.data import glyphs
from clip_jax.errors import DataError


def _all_labels(names: Sequence[str]) -> np.ndarray:
    return np.arange(len(names))


@dataclasses.dataclass(frozen=True)
class EvalDataset:
    """One evaluation set.

    Attributes:
        source: where the examples are, as `config.data.train` would say it.
        tasks: what can be asked of it; keys of `clip_jax.eval.TASKS`.
        templates: prompts, "{}" standing for the class name.
        classes: class names of the data set -> the labels among which zero-shot chooses.
    """

    source: str
    tasks: tuple[str, ...]
    templates: tuple[str, ...]
    classes: Callable[[Sequence[str]], np.ndarray] = _all_labels


DATASETS: dict[str, EvalDataset] = {
    "glyphs": EvalDataset(
        source="tfds:glyphs:test",
        tasks=("zero_shot", "retrieval"),
        templates=tuple(f"{face} {{}}" for face in glyphs.FACES),
        classes=glyphs.held_out,
    ),
}


def eval_dataset(name: str) -> EvalDataset:
    """The entry of that name.

    Raises:
        DataError: no such name; the message lists those there are.
    """
    if name not in DATASETS:
        raise DataError(f"no evaluation set {name!r}; there are: {', '.join(DATASETS)}")
    return DATASETS[name]
