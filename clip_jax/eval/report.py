"""What a run leaves for a person: pictures in the workdir, and a closing page in the terminal."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.labelled import Example
from clip_jax.eval import plots
from clip_jax.eval.embed import Encoder, decode
from clip_jax.eval.opening import OpenDataset, find
from clip_jax.eval.outcome import softmax
from clip_jax.preprocess import Preprocess
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
    encoder = Encoder(result.model, result.preprocess, result.mesh, config.eval.batch_size)
    dataset = find(name, config.data.data_dir)[0]
    source = dataset.split("test")
    examples = _distinct(source.examples(), result.preprocess)
    pixels = np.stack([picture for _, picture in examples])
    images = encoder.images(pixels)
    figures = {}

    captioned = [row for row, (example, _) in enumerate(examples) if example.captions]
    captioned = captioned[:MATRIX_SIZE]
    if captioned:
        captions = [examples[row][0].captions[0] for row in captioned]
        similarity = images[captioned] @ encoder.texts(captions).T
        figures[f"{name}_similarity"] = plots.similarity_matrix(
            pixels[captioned], captions, similarity
        )
    if source.label_names is not None:
        figures[f"{name}_predictions"] = _predictions(encoder, dataset, examples, images, pixels)
    return figures


def _predictions(encoder, dataset: OpenDataset, examples, images, pixels) -> plots.Figure:
    source = dataset.split("test")
    classes = dataset.classes(source)
    labels = np.unique([example.label for example in source.examples()])
    entries = [classes.entries[each] for each in classes.of_label[labels]]
    scores = images @ encoder.class_vectors(entries, dataset.entry.templates).T
    names = [entry.prompts[0] for entry in entries]
    truth = [names[np.searchsorted(labels, example.label)] for example, _ in examples]
    return plots.predictions(pixels, truth, names, softmax(encoder.logit_scale * scores))


def _distinct(
    examples: Iterable[Example], preprocess: Preprocess
) -> list[tuple[Example, np.ndarray]]:
    """The first examples of different classes, and their pixels."""
    found: dict[object, tuple[Example, np.ndarray]] = {}
    for number, example in enumerate(examples):
        key = number if example.label is None or np.ndim(example.label) else example.label
        if key in found:
            continue
        pixels = decode(example.image(), preprocess)
        if pixels is not None:
            found[key] = (example, pixels)
        if len(found) == GRID_SIZE:
            break
    return list(found.values())
