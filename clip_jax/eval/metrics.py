"""Metrics on scores, in plain NumPy; names as CLIP_benchmark has them."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int


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


def classification_metrics(
    scores: Float[np.ndarray, "N C"], target: Int[np.ndarray, " N"]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and the mean over the classes of their top-1 accuracy."""
    top1 = hit_at_k(scores, target, 1)
    counts = np.bincount(target, minlength=scores.shape[1])
    by_class = np.bincount(target, weights=top1, minlength=scores.shape[1])
    present = counts > 0
    return {
        "acc1": float(top1.mean()),
        "acc5": float(hit_at_k(scores, target, 5).mean()),
        "mean_per_class_recall": float((by_class[present] / counts[present]).mean()),
    }


def retrieval_metrics(
    image: Float[np.ndarray, "N E"], text: Float[np.ndarray, "N E"], chunk: int = 1024
) -> dict[str, float]:
    """Recall at 1, 5 and 10 of the one text that belongs to an image, and the reverse."""

    def recalls(queries: np.ndarray, items: np.ndarray, name: str) -> Iterator[tuple[str, float]]:
        hits: dict[int, list[np.ndarray]] = {1: [], 5: [], 10: []}
        for start in range(0, len(queries), chunk):
            rows = np.arange(start, min(start + chunk, len(queries)))
            scores = queries[rows] @ items.T
            for k, found in hits.items():
                found.append(hit_at_k(scores, rows, k))
        for k, found in hits.items():
            yield f"{name}_retrieval_recall@{k}", float(np.concatenate(found).mean())

    return dict(recalls(image, text, "text")) | dict(recalls(text, image, "image"))
