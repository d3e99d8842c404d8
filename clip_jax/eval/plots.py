"""Figures, drawn from plain arrays; each function returns a matplotlib Figure."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and temperature over the steps, from the lines of metrics.jsonl."""
    lines = [line for line in metrics if "loss" in line]
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, scale = figure.subplots(2, 1, sharex=True)
    loss.plot(steps, [line["loss"] for line in lines], color="tab:blue")
    loss.set(ylabel="contrastive loss (nats)")
    scale.plot(steps, [line["logit_scale"] for line in lines], color="tab:orange")
    scale.set(xlabel="step", ylabel="logit scale (1 / temperature)")
    for axes in (loss, scale):
        axes.grid(alpha=0.3)
    return figure


def similarity_matrix(
    images: UInt8[np.ndarray, "N H W 3"],
    captions: Sequence[str],
    similarity: Float[np.ndarray, "N N"],
) -> Figure:
    """Cosine similarities of every image (columns) with every caption (rows), as in figure 1."""
    count = len(captions)
    figure = Figure(figsize=(0.6 * count + 4, 0.6 * count + 1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(similarity.T, cmap="viridis")
    middle = (similarity.min() + similarity.max()) / 2
    for row, column in np.ndindex(count, count):
        value = similarity[column, row]
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            size=8,
            color="white" if value < middle else "black",
        )
    axes.set_yticks(range(count), [textwrap.fill(caption, 40) for caption in captions], size=8)
    axes.set_xticks([])
    for column, image in enumerate(images):
        axes.imshow(image, extent=(column - 0.48, column + 0.48, -0.56, -1.52))
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -1.6))
    axes.spines[:].set_visible(False)
    return figure


def predictions(
    images: UInt8[np.ndarray, "N H W 3"],
    truth: Sequence[str],
    names: Sequence[str],
    probabilities: Float[np.ndarray, "N C"],
    columns: int = 4,
) -> Figure:
    """Pictures, each with its five most probable names; the right one is green."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, width_ratios=[1, 1.6] * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = grid.reshape(rows * columns, 2)
    for (picture, bars), image, true_name, row in zip(
        cells, images, truth, probabilities, strict=False
    ):
        picture.imshow(image)
        picture.set_title("\n".join(textwrap.wrap(true_name, 24)[:3]), size=7)
        best = np.argsort(-row)[:5]
        colors = ["tab:green" if names[label] == true_name else "tab:gray" for label in best]
        bars.barh(range(5), row[best], color=colors, alpha=0.5)
        for place, label in enumerate(best):
            text = f"{row[label]:.0%} {textwrap.shorten(names[label], 44, placeholder='…')}"
            bars.text(0.01, place, text, va="center", size=6)
        bars.set(xlim=(0, 1), ylim=(4.5, -0.5))
    return figure
