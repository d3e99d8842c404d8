"""Charts of results, drawn from plain arrays; each function returns a matplotlib Figure."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.figure import Figure

from clip_jax.eval.metrics import calibration

_MOST_CLASSES = 50  # that a confusion matrix or a bar chart names one by one
_HIT, _MISS, _NEUTRAL = "tab:green", "tab:red", "tab:blue"


def confusion_matrix(
    target: Int[np.ndarray, " N"], chosen: Int[np.ndarray, " N"], names: Sequence[str]
) -> Figure:
    """Shares of each true class (rows) that went to each class; the most confused of many."""
    classes = len(names)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (target, chosen), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    title = "share of each true class, by what was chosen"
    if classes > _MOST_CLASSES:
        wrong = counts * (1 - np.eye(classes))
        worst = np.argsort(-(wrong + wrong.T).sum(axis=1), kind="stable")[: _MOST_CLASSES // 2]
        worst.sort()
        shares, names = shares[np.ix_(worst, worst)], [names[each] for each in worst]
        title += f"; the {len(worst)} most confused of {classes} classes"
    size = 0.28 * len(names) + 3.2
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, shrink=0.7)
    short = [textwrap.shorten(name, 28, placeholder="…") for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, size=7)
    axes.set_yticks(range(len(names)), short, size=7)
    axes.set(xlabel="chosen", ylabel="true")
    axes.set_title(title, size=9, loc="left", wrap=True)
    if len(names) <= 12:
        for row, column in np.ndindex(shares.shape):
            value = shares[row, column]
            color = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}"[1 * (value < 1) :], ha="center", va="center",
                      size=7, color=color)  # fmt: skip
    return figure


def class_bars(
    target: Int[np.ndarray, " N"], right: Shaped[np.ndarray, " N"], names: Sequence[str]
) -> Figure:
    """Accuracy of each class, best first; of many classes the best and the worst."""
    counts = np.bincount(target, minlength=len(names))
    shares = np.bincount(target, weights=right, minlength=len(names)) / np.maximum(counts, 1)
    present = np.flatnonzero(counts)
    order = present[np.argsort(-shares[present], kind="stable")]
    title = "accuracy by class (number of examples)"
    if len(order) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        title += f"; the {half} best and worst of {len(order)}"
        order = np.concatenate([order[:half], order[-half:]])
    figure = Figure(figsize=(7, 0.2 * len(order) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), shares[order], color=_NEUTRAL, alpha=0.7)
    mean = float(shares[present].mean())
    axes.axvline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:.1%}")
    short = [
        f"{textwrap.shorten(names[each], 40, placeholder='…')} ({counts[each]})" for each in order
    ]
    axes.set_yticks(range(len(order)), short, size=7)
    axes.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6))
    axes.set_title(title, size=9, loc="left")
    axes.legend(fontsize=7, loc="lower right")
    return figure


def reliability(probability: Float[np.ndarray, " N"], right: Shaped[np.ndarray, " N"]) -> Figure:
    """Accuracy against confidence, and how often each confidence occurs."""
    confidence, accuracy, size, error = calibration(probability, right.astype(np.float64))
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--")
    above.plot(confidence, accuracy, marker="o", color=_NEUTRAL)
    above.set(ylim=(0, 1), ylabel="accuracy")
    above.set_title(f"calibration: expected error {error:.1%}", size=9, loc="left")
    below.bar(confidence, size / size.sum(), width=0.04, color=_NEUTRAL, alpha=0.7)
    below.set(xlim=(0, 1), xlabel="probability of the chosen class", ylabel="share")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def hits_and_misses(
    pictures: Sequence[np.ndarray], truth: Sequence[str], chosen: Sequence[str],
    probability: Sequence[float], columns: int = 6,
) -> Figure:  # fmt: skip
    """Pictures with the class that was chosen, green where it is right; misses name the truth."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture, true, name, share in zip(
        grid.flat, pictures, truth, chosen, probability, strict=False
    ):
        axes.imshow(picture)
        text = f"{share:.0%} " + textwrap.shorten(name, 44, placeholder="…")
        if true != name:
            text += "\nis: " + textwrap.shorten(true, 44, placeholder="…")
        wrapped = "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, 24))
        axes.set_title(wrapped, size=7, color=_HIT if true == name else _MISS)
    return figure


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[np.ndarray, str]]]], columns: int = 6
) -> Figure:
    """Pictures with labels, under a title for each group."""
    heights = [-(-max(len(pictures), 1) // columns) for _, pictures in rows]
    figure = Figure(figsize=(1.8 * columns, 2.05 * sum(heights) + 0.3 * len(rows)))
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, height, (title, pictures) in zip(parts, heights, rows, strict=True):
        part.suptitle(textwrap.shorten(title, 110, placeholder="…"), size=10, x=0.02, ha="left")
        grid = part.subplots(height, columns, squeeze=False)
        part.subplots_adjust(left=0.01, right=0.99, top=1 - 0.38 / (2.05 * height), bottom=0.02,
                             wspace=0.05, hspace=0.2)  # fmt: skip
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (picture, label) in zip(grid.flat, pictures, strict=False):
            axes.imshow(picture)
            axes.set_title(label, size=7, pad=2)
    return figure


def zero_shot_versus_probe(differences: Mapping[str, float], what: str) -> Figure:
    """Zero-shot minus linear probe in points, by data set, as the paper's figure 5."""
    names = sorted(differences, key=lambda name: -differences[name])
    values = [differences[name] for name in names]
    figure = Figure(figsize=(7, 0.26 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = [_HIT if value >= 0 else _NEUTRAL for value in values]
    axes.barh(range(len(names)), values, color=colors, alpha=0.7)
    for place, value in enumerate(values):
        axes.annotate(f"{value:+.1f}", (value, place), (3 if value >= 0 else -3, 0),
                      textcoords="offset points", va="center", size=7,
                      ha="left" if value >= 0 else "right")  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, size=8)
    axes.margins(x=0.15)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="points")
    axes.set_title(f"zero-shot minus linear probe, {what}", size=9, loc="left")
    return figure


def groups(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Shares by group, a panel each."""
    columns = 4
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shares) :]:
        axes.set_axis_off()
    for axes, (title, by_group) in zip(grid.flat, shares.items(), strict=False):
        axes.barh(range(len(by_group)), by_group.values(), color=_NEUTRAL, alpha=0.7)
        for place, value in enumerate(by_group.values()):
            axes.text(0.01, place, f"{value:.1%}", va="center", size=6)
        axes.set_yticks(range(len(by_group)), list(by_group), size=6)
        axes.set(xlim=(0, 1), ylim=(len(by_group) - 0.4, -0.6))
        axes.set_title(title, size=8, loc="left")
    return figure


def shots(
    by_shots: Sequence[tuple[float, float]], zero_shot: float, metric: str, worth: str
) -> Figure:
    """The score of few-shot logistic regression by examples a class, beside that of zero-shot."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    count, score = np.array(sorted(by_shots)).T
    axes.plot(count, 100 * score, marker="o", color=_NEUTRAL, label="logistic regression")
    axes.axhline(100 * zero_shot, color=_HIT, linestyle="--", label="zero-shot")
    axes.set_xscale("log", base=2)
    axes.set_xticks(count, [f"{each:g}" for each in np.round(count, 1)])
    axes.minorticks_off()
    axes.set(xlabel="training examples a class (the last: all)", ylabel=f"{metric} (%)")
    axes.set_title(worth, size=9, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
