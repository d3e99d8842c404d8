"""Choice between captions that say the same words of different things: SugarCrepe, Winoground.

SugarCrepe: a picture, its caption and a wrong one. Winoground: two pictures and two captions; the
text is right when both pictures prefer theirs, the image when both captions do. Names of metrics as
in CLIP_benchmark; a tie is no preference. Where a data set names words that replace each other, its
captions that hold one are scored against themselves with the other.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from clip_jax.data.labelled import Example, Labelled, images_below, read_table
from clip_jax.errors import DataError
from clip_jax.eval.metrics import weighted_mean
from clip_jax.eval.outcome import Data, Options, Outcome, measured

_PICTURES = ("images", "val2017", ".")


def compositional(data: Data, options: Options) -> Outcome:
    """Scores the instances of the folder, by its form, or captions with a word replaced.

    Raises:
        DataError: not one of the forms, or a picture that is missing or unreadable.
    """
    if data.dataset.entry.replaced_words:
        return _replaced_words(data, options)
    folder = data.dataset.folder
    if folder is None:
        raise DataError(f"{data.dataset.where} has no pairs of captions to choose from")
    if (folder / "examples.jsonl").exists():
        return _winoground(data, folder, options)
    subsets = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not subsets:
        raise DataError(
            f"{folder} should hold SugarCrepe's JSON files (add_att.json ...) or Winoground's "
            "examples.jsonl, and the pictures in images/"
        )
    return _sugarcrepe(data, folder, subsets, options)


def _sugarcrepe(
    data: Data, folder: epath.Path, subsets: dict[str, epath.Path], options: Options
) -> Outcome:
    files, captions, groups = [], list[Sequence[str]](), list[str]()
    for name, path in subsets.items():
        for row in json.loads(path.read_text()).values():
            files.append(row["filename"])
            captions.append((row["caption"], row["negative_caption"]))
            groups.append(name)
    scores = _scores(data, folder, [[file] for file in files], captions)
    return _of_groups(scores[:, 0, 0] > scores[:, 0, 1], groups, options)


def _replaced_words(data: Data, options: Options) -> Outcome:
    captions = [example.captions for example in data.split("test").examples()]
    embedded = data.embedded("test")
    rows, own, wrong, kinds = [], list[str](), list[str](), list[str]()
    for row, place in enumerate(embedded.places):
        for caption in captions[place]:
            words = caption.split(" ")
            for kind, (one, other) in data.dataset.entry.replaced_words.items():
                swap = {one: other, other: one}
                if not swap.keys().isdisjoint(words):
                    rows.append(row)
                    own.append(caption)
                    wrong.append(" ".join(swap.get(word, word) for word in words))
                    kinds.append(kind)
    if not rows:
        raise DataError(f"{data.dataset.where} has no caption with a word to replace")
    images = embedded.image[rows]
    margin = np.sum(images * (data.encoder.texts(own) - data.encoder.texts(wrong)), axis=1)
    outcome = _of_groups(margin > 0, kinds, options)
    return dataclasses.replace(outcome, unreadable=embedded.unreadable)


def _of_groups(preferred: np.ndarray, groups: Sequence[str], options: Options) -> Outcome:
    """The share of instances that prefer the right caption, of all and of each group."""
    right = preferred.astype(np.float64)
    group = np.array(groups)
    statistics: dict[str, Any] = {"acc": functools.partial(weighted_mean, right)}
    for name in dict.fromkeys(groups):
        of_group = group == name
        statistics[f"acc_{name}"] = lambda weights, rows=of_group: weighted_mean(
            right[rows], weights[rows]
        )
    metrics, intervals = measured(statistics, len(right), options)
    return Outcome(metrics, intervals, len(right))


def _winoground(data: Data, folder: epath.Path, options: Options) -> Outcome:
    rows = read_table(folder / "examples.jsonl")
    files = [[row["image_0"], row["image_1"]] for row in rows]
    captions = [(row["caption_0"], row["caption_1"]) for row in rows]
    scores = _scores(data, folder, files, captions)  # instance, picture, caption
    own = scores[:, [0, 1], [0, 1]]
    text = (own > scores[:, [0, 1], [1, 0]]).all(axis=1)
    image = (own > scores[:, [1, 0], [0, 1]]).all(axis=1)
    hits = {"text_acc": text, "image_acc": image, "acc": text & image}
    statistics = {
        name: functools.partial(weighted_mean, np.asarray(right, np.float64))
        for name, right in hits.items()
    }
    metrics, intervals = measured(statistics, len(rows), options)
    return Outcome(metrics, intervals, len(rows))


def _scores(
    data: Data,
    folder: epath.Path,
    files: Sequence[Sequence[str]],
    captions: Sequence[Sequence[str]],
) -> np.ndarray:
    """Cosines of an instance's pictures and captions: [instances, pictures, captions]."""
    flat = list(dict.fromkeys(file for of_instance in files for file in of_instance))
    paths = _find(folder, flat)

    def examples() -> Iterator[Example]:
        for path in paths:
            yield Example(str(path), path.read_bytes)

    embedded = data.encoder.source(Labelled(str(folder), examples))
    if embedded.unreadable:
        raise DataError(f"{embedded.unreadable} pictures of {folder} cannot be read")
    row = {file: number for number, file in enumerate(flat)}
    rows = np.array([[row[file] for file in of_instance] for of_instance in files])
    texts = data.encoder.texts([text for of_instance in captions for text in of_instance])
    texts = texts.reshape(len(captions), -1, texts.shape[-1])
    return np.einsum("nie,nte->nit", embedded.image[rows], texts)


def _find(folder: epath.Path, files: Sequence[str]) -> list[epath.Path]:
    """The pictures, whose names may lack the suffix (Winoground's do)."""
    for name in _PICTURES:
        if (folder / name).is_dir():
            by_name = {path.name: path for path in images_below(folder / name)}
            by_name |= {path.stem: path for path in by_name.values()}
            break
    missing = [file for file in files if file not in by_name]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(files)} pictures, such as {missing[0]}; put "
            "them into images/"
        )
    return [by_name[file] for file in files]
