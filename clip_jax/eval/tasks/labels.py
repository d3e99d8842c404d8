"""Labels of the data -> classes to choose from, and the metrics of a choice."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.labelled import Labelled
from clip_jax.errors import DataError
from clip_jax.eval.embed import Embedded
from clip_jax.eval.metrics import (
    Statistic,
    binary_statistics,
    classification_statistics,
    multilabel_statistics,
)
from clip_jax.eval.opening import Classes, OpenDataset
from clip_jax.eval.registry import ClassName


class Targets(NamedTuple):
    """The right classes of the rows of a split that count."""

    rows: Int[np.ndarray, " N"]  # of `Embedded`
    target: Int[np.ndarray, "N *labels"]  # a class; or, of several labels, 1, 0, -1 for each class
    entries: tuple[ClassName, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """One name a class, for people."""
        return [entry.prompts[0] for entry in self.entries]


def find_targets(dataset: OpenDataset, source: Labelled, embedded: Embedded) -> Targets:
    """The classes to choose from, and which one is right for each example.

    Raises:
        DataError: no labels, labels beyond the names, examples of classes that are not to choose
            from, or, in the user's own folder, a class without a picture.
    """
    label = embedded.label
    if label is None:
        raise DataError(f"{source.where} has no labels, which the task needs")
    classes = dataset.classes(source)
    labels = len(classes.of_label)
    if label.ndim == 2:
        if label.shape[1] != labels:
            raise DataError(
                f"{source.where} has {label.shape[1]} labels an example, but {labels} names"
            )
        order = _labels_of_classes(classes)
        return Targets(np.arange(len(label)), label[:, order], classes.entries, ())
    if label.min() < 0 or label.max() >= labels:
        raise DataError(
            f"{source.where} has the label {label.max() if label.max() >= labels else label.min()}"
            f", but names for 0 to {labels - 1}"
        )
    target = classes.of_label[label]
    known = target >= 0
    if not known.all() and not dataset.entry.ignore_other_classes:
        names = source.label_names or ()
        strangers = [names[each] for each in np.unique(label[~known])[:5]]
        raise DataError(
            f"{source.where} has {np.sum(~known)} examples of classes that are not to choose from: "
            f"{', '.join(strangers)}"
        )
    rows = np.flatnonzero(known)
    if not len(rows):
        raise DataError(f"{source.where} has no example of the classes to choose from")
    return _of_present(dataset, source, Targets(rows, target[rows], classes.entries, ()))


def _of_present(dataset: OpenDataset, source: Labelled, targets: Targets) -> Targets:
    """Deals with classes that have no example."""
    counts = np.bincount(targets.target, minlength=len(targets.entries))
    absent = np.flatnonzero(counts == 0)
    if not len(absent):
        return targets
    if dataset.entry.candidates == "present":
        present = np.flatnonzero(counts)
        entries = tuple(targets.entries[each] for each in present)
        return targets._replace(target=np.searchsorted(present, targets.target), entries=entries)
    names = ", ".join(targets.names[each] for each in absent[:5])
    if dataset.own:
        raise DataError(
            f"{source.where} has no picture of {len(absent)} of its {len(counts)} classes: "
            f"{names}; add some or leave the class out"
        )
    note = f"{len(absent)} of {len(counts)} classes have no example: {names}"
    return targets._replace(notes=(*targets.notes, note))


def _labels_of_classes(classes: Classes) -> Int[np.ndarray, " C"]:
    labels = np.full(len(classes.entries), -1)
    known = classes.of_label >= 0
    labels[classes.of_label[known]] = np.flatnonzero(known)
    return labels


def statistics_of(
    scores: Float[np.ndarray, "N C"], target: Int[np.ndarray, "N *labels"], metric: str
) -> dict[str, Statistic]:
    """The metrics that fit: of several labels, of two classes, or of many.

    Args:
        scores: of all classes.
        target: as in `Targets`.
        metric: the data set's; the mean of top-1 and top-5 is given where it is asked for only.

    Raises:
        DataError: the data set's metric is none of them.
    """
    if target.ndim == 2:
        found = multilabel_statistics(scores, target)
    elif scores.shape[1] == 2:
        found = binary_statistics(scores, target)
    else:
        found = classification_statistics(scores, target)
    if metric not in found:
        raise DataError(
            f"{metric} cannot be had of {scores.shape[1]} classes and "
            f"{'several labels' if target.ndim == 2 else 'one label'} an example; "
            f"there are: {', '.join(found)}"
        )
    return {k: v for k, v in found.items() if k != "mean_acc1_acc5" or k == metric}
