"""What a run leaves for a person: pictures in the workdir, and a closing page in the terminal."""

from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.batches import EvalBatch, eval_batches
from clip_jax.data.sources import Source, open_source
from clip_jax.eval import plots
from clip_jax.eval.datasets import eval_dataset
from clip_jax.eval.embed import embed_images, embed_texts
from clip_jax.eval.tasks import build_classifier
from clip_jax.training.loop import Result
from clip_jax.training.metrics import FILE, read_metrics

MATRIX_SIZE = 12
GRID_SIZE = 24


def write_report(result: Result, config: ConfigDict, workdir: str) -> None:
    """Draws the plots of a finished run and prints its results; all hosts must call it."""
    figures = {"training_curves": plots.training_curves(read_metrics(workdir))}
    for name in config.eval.datasets:
        figures |= _example_figures(name, result, config)
    if jax.process_index() != 0:
        return
    directory = epath.Path(workdir) / "plots"
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with (directory / f"{name}.png").open("wb") as file:
            figure.savefig(file, format="png", dpi=110)
    print()
    if result.metrics:
        print(table(result.metrics))
    print(f"checkpoints  {epath.Path(workdir) / 'checkpoints'}")
    print(f"plots        {directory}")
    print(f"log          {epath.Path(workdir) / FILE} (and TensorBoard's beside it)")
    print(f"use it       clip_jax.load({str(workdir)!r})")


def table(metrics: Mapping[str, float]) -> str:
    """Metrics, shares of one, as lines of name and per cent."""
    width = max(map(len, metrics))
    return "\n".join(f"{name:<{width}}  {100 * value:6.2f} %" for name, value in metrics.items())


def _example_figures(name: str, result: Result, config: ConfigDict) -> dict[str, plots.Figure]:
    """The similarity matrix of some pairs, and the five most probable names of some images."""
    dataset = eval_dataset(name)
    source = open_source(dataset.source, config.data)
    batch_size = config.eval.batch_size
    batch = next(eval_batches(source, result.preprocess, batch_size))
    model, mesh = result.model, result.mesh
    image = embed_images(model, result.preprocess, batch.image, mesh)
    figures = {}

    chosen = _distinct(batch, MATRIX_SIZE)
    captions = [batch.features["caption"][row].decode() for row in chosen]
    text = embed_texts(model, captions, mesh, batch_size)
    figures[f"{name}_similarity"] = plots.similarity_matrix(
        batch.image[chosen], captions, image[chosen] @ text.T
    )

    chosen = _distinct(batch, GRID_SIZE)
    classifier = build_classifier(model, dataset, source, mesh, batch_size)
    logits = float(np.exp(model.logit_scale[...])) * (image[chosen] @ classifier.weights.T)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    figures[f"{name}_predictions"] = plots.predictions(
        batch.image[chosen],
        _true_names(source, batch, chosen),
        classifier.names,
        probabilities / probabilities.sum(axis=1, keepdims=True),
    )
    return figures


def _distinct(batch: EvalBatch, count: int) -> np.ndarray:
    """The first rows that show `count` different classes."""
    _, first = np.unique(batch.features["label"][batch.valid], return_index=True)
    return np.sort(first)[:count]


def _true_names(source: Source, batch: EvalBatch, rows: np.ndarray) -> list[str]:
    assert source.label_names is not None
    return [source.label_names[label] for label in batch.features["label"][rows]]
