"""The tasks: embeddings of a data set -> metrics."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.data.sources import Source
from clip_jax.errors import DataError
from clip_jax.eval.datasets import EvalDataset
from clip_jax.eval.embed import Embedded, embed_texts
from clip_jax.eval.metrics import classification_metrics, retrieval_metrics
from clip_jax.models import CLIP


class Classifier(NamedTuple):
    """Classes in the embedding space."""

    labels: Int[np.ndarray, " C"]  # the data set's label of each class
    names: list[str]
    weights: Float[np.ndarray, "C E"]  # unit length


def build_classifier(
    model: CLIP, dataset: EvalDataset, source: Source, mesh: Mesh, batch_size: int
) -> Classifier:
    """The paper's prompt ensemble (section 3.1.4) over the classes of a data set.

    Every template is filled with every class name and encoded; a class is the mean of its
    unit-length embeddings, brought to unit length.

    Raises:
        DataError: the source has no labels with names.
    """
    if source.label_names is None:
        raise DataError(f"{source.spec} has no named labels, which zero-shot classification needs")
    labels = dataset.classes(source.label_names)
    names = [source.label_names[label] for label in labels]
    weights = prompt_ensemble(model, names, dataset.templates, mesh, batch_size)
    return Classifier(labels, names, weights)


def prompt_ensemble(
    model: CLIP, names: Sequence[str], templates: Sequence[str], mesh: Mesh, batch_size: int
) -> Float[np.ndarray, "C E"]:
    """One unit-length vector a name: the mean over its prompts."""
    prompts = [template.format(name) for name in names for template in templates]
    embeddings = embed_texts(model, prompts, mesh, batch_size)
    mean = embeddings.reshape(len(names), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def zero_shot(
    model: CLIP,
    dataset: EvalDataset,
    source: Source,
    embedded: Embedded,
    mesh: Mesh,
    batch_size: int,
) -> dict[str, float]:
    """Zero-shot classification: the class whose prompts lie nearest."""
    if embedded.label is None:
        raise DataError(f"{source.spec} has no labels")
    classifier = build_classifier(model, dataset, source, mesh, batch_size)
    target = np.searchsorted(classifier.labels, embedded.label)
    known = target < len(classifier.labels)
    if not np.all(known) or np.any(classifier.labels[target] != embedded.label):
        raise DataError(f"{source.spec} has examples of classes that are not to choose from")
    return classification_metrics(embedded.image @ classifier.weights.T, target)


def retrieval(
    model: CLIP,
    dataset: EvalDataset,
    source: Source,
    embedded: Embedded,
    mesh: Mesh,
    batch_size: int,
) -> dict[str, float]:
    """Image-text retrieval both ways among the pairs of the data set."""
    del model, dataset, mesh, batch_size
    if embedded.text is None:
        raise DataError(f"{source.spec} has no captions")
    return retrieval_metrics(embedded.image, embedded.text)


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
}
