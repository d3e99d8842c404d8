"""Robustness to natural distribution shift, as the paper's figure 13.

Accuracy on ImageNet against accuracy on sets that show the same classes differently. A model that
loses nothing lies on the diagonal. The ResNet-101 trained on ImageNet that the paper compares with
shows what ImageNet models lose; how far a model lies above it, at its own accuracy on ImageNet, is
its effective robustness (Taori et al., 2020), for which the usual straight line in logits is drawn
through that one model with slope one.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

SHIFTS = {
    "imagenet_v2": "ImageNetV2",
    "imagenet_r": "ImageNet-R",
    "objectnet": "ObjectNet",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_a": "ImageNet-A",
}
# Per cent. Figure 13 of the paper: the ResNet-101 and CLIP ViT-L/14@336px that agree on ImageNet.
RESNET101 = {
    "imagenet": 76.2, "imagenet_v2": 64.3, "imagenet_r": 37.7, "objectnet": 32.6,
    "imagenet_sketch": 25.2, "imagenet_a": 2.7,
}  # fmt: skip
# OpenCLIP's published tables, of OpenAI's weights.
CLIP_MODELS = {
    "RN50": (59.8, 52.8, 60.7, 41.4, 35.4, 23.3),
    "ViT-B/32": (63.3, 55.9, 69.3, 44.3, 42.3, 31.6),
    "ViT-B/16": (68.3, 61.9, 77.7, 55.3, 48.2, 50.0),
    "ViT-L/14": (75.5, 69.8, 87.8, 68.9, 59.6, 70.8),
    "ViT-L/14@336px": (76.6, 70.9, 89.0, 71.8, 61.0, 77.5),
}


def effective_robustness(imagenet: float, shifted: float, shift: str) -> float:
    """Accuracy beyond what an ImageNet model of this accuracy would have, shares of one.

    Args:
        imagenet: accuracy on ImageNet.
        shifted: accuracy on the shifted set.
        shift: a key of `SHIFTS`.
    """
    offset = _logit(RESNET101[shift] / 100) - _logit(RESNET101["imagenet"] / 100)
    return shifted - float(_sigmoid(_logit(imagenet) + offset))


def draw_robustness(accuracy: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """One panel a shifted set; None where no model has ImageNet and a shifted set.

    Args:
        accuracy: by model, by data set, shares of one.
    """
    models = {name: sets for name, sets in accuracy.items() if "imagenet" in sets}
    shifts = [shift for shift in SHIFTS if any(shift in sets for sets in models.values())]
    if not shifts:
        return None
    columns = min(len(shifts), 3)
    rows = -(-len(shifts) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shifts) :]:
        axes.set_axis_off()
    names = list(SHIFTS)
    for axes, shift in zip(grid.flat, shifts, strict=False):
        line = np.linspace(0.3, 0.95, 200)
        axes.plot(100 * line, 100 * line, color="black", linewidth=0.8, label="no loss")
        offset = _logit(RESNET101[shift] / 100) - _logit(RESNET101["imagenet"] / 100)
        expected = 100 * _sigmoid(_logit(line) + offset)
        axes.plot(100 * line, expected, color="tab:gray", linestyle="--", linewidth=0.8)
        axes.plot(RESNET101["imagenet"], RESNET101[shift], "s", color="tab:gray",
                  label="ResNet-101 trained on ImageNet")  # fmt: skip
        published = np.array(list(CLIP_MODELS.values()))
        axes.plot(published[:, 0], published[:, 1 + names.index(shift)], "o", markersize=4,
                  color="tab:purple", alpha=0.6, label="OpenAI's CLIP, by OpenCLIP")  # fmt: skip
        title = SHIFTS[shift]
        for number, (name, sets) in enumerate(models.items()):
            if shift not in sets:
                continue
            axes.plot(100 * sets["imagenet"], 100 * sets[shift], "*", markersize=12,
                      color=f"C{number % 8}", label=name)  # fmt: skip
            if len(models) == 1:
                beyond = effective_robustness(sets["imagenet"], sets[shift], shift)
                title += f": {100 * beyond:+.1f} points beyond an ImageNet model"
        axes.set(xlabel="ImageNet (%)", ylabel=f"{SHIFTS[shift]} (%)")
        axes.set_title(title, size=8, loc="left")
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize=6)
    return figure


def _logit(share):
    share = np.clip(share, 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share))


def _sigmoid(logit):
    return 1 / (1 + np.exp(-logit))
