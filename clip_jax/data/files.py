"""Sources whose pictures are files: tables of paths and captions, and folders."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from clip_jax.data.paths import is_folder, join, list_folder
from clip_jax.data.shards import (
    IMAGE_EXTENSIONS,
    caption_fields,
    caption_strings,
    pair_fields,
)
from clip_jax.data.source import Features, Record, Source
from clip_jax.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl")
# Columns, the first that a table has; OpenCLIP's default names, and the usual ones.
IMAGE_COLUMNS = ("filepath", "file", "path", "image", "file_name", "filename", "image_path", "url")
CAPTION_COLUMNS = ("title", "caption", "captions", "text", "txt")
LABEL_COLUMNS = ("label", "class", "cls")
# Bytes that a record of a window counts for. It holds no picture, so it is small; but its order is
# random already, and a window needs no more records than reading ahead does.
_NOMINAL = 1 << 16


def open_table(
    spec: str, paths: Sequence[str], image: str | None, captions: Mapping[str, float]
) -> Source:
    """CSV (comma or tab), TSV or JSONL: a path, and captions or a label, in each row.

    Paths are relative to the table. In JSONL a caption may be a list of them.

    Args:
        spec: names it in messages.
        paths: of the tables.
        image: column of the paths; None: the first of `IMAGE_COLUMNS` that is there.
        captions: probability by column; none: the first of `CAPTION_COLUMNS` that is there.

    Raises:
        DataError: a table that cannot be read, or without the columns.
    """
    pictures: list[str] = []
    texts: list[list[list[bytes]]] = []  # by row, by column
    labels: list[Any] = []
    for path in paths:
        rows = _rows(path)
        columns = set().union(*(row.keys() for row in rows[:100]))
        images = (image,) if image else IMAGE_COLUMNS
        chosen = next((name for name in images if name in columns), None)
        if chosen is None:
            raise DataError(f"{path} has no column {' or '.join(images)}, only {sorted(columns)}")
        if not captions:
            captions = {name: 1.0 for name in CAPTION_COLUMNS if name in columns}
            captions = dict(list(captions.items())[:1])
        elif missing := [name for name in captions if name not in columns]:
            raise DataError(f"{path} has no column {missing[0]!r}, only {sorted(columns)}")
        label = next((name for name in LABEL_COLUMNS if name in columns), None)
        folder = path.rpartition("/")[0] or "."
        for row in rows:
            pictures.append(join(folder, str(row.get(chosen) or "")))
            texts.append([caption_strings(row.get(name)) for name in captions])
            if label:
                labels.append(row.get(label))
    if not pictures:
        raise DataError(f"{spec} has no rows")
    if labels and len(labels) != len(pictures):
        raise DataError(f"{spec}: some of the tables have labels and some have none")
    numbers, names = _numbered(labels)
    return _of_files(spec, pictures, texts, tuple(captions.values()), numbers, names)


def open_folder(spec: str, folder: str) -> Source:
    """A folder of pictures, or of folders of them, which are classes.

    Where pictures have their caption in a `.txt` beside them, as img2dataset leaves them in
    numbered folders, those are the captions, and there are no classes.

    Raises:
        DataError: a folder without pictures.
    """
    below = [name for name in list_folder(folder) if not name.startswith(".")]
    classes = [] if _pictures(below) else [n for n in below if is_folder(join(folder, n))]
    listed = {name: list_folder(join(folder, name)) for name in classes} or {"": below}
    paths: list[str] = []
    texts: list[list[list[bytes]]] = []
    labels: list[str] = []
    for name, names in listed.items():
        there = set(names)
        for picture in _pictures(names):
            stem = join(folder, f"{name}/{picture}" if name else picture)
            beside = f"{picture.rpartition('.')[0]}.txt" in there
            paths.append(stem)
            texts.append([[f"{stem.rpartition('.')[0]}.txt".encode()] if beside else []])
            labels.append(name)
    if not paths:
        raise DataError(
            f"{folder} has neither pictures ({', '.join(IMAGE_EXTENSIONS)}) nor folders of them"
        )
    if not classes or any(map(any, texts)):
        return _of_files(spec, paths, texts, (1.0,), None, None, captions_are_paths=True)
    return _of_files(spec, paths, [[]] * len(paths), (), *_by_name(labels))


def _pictures(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]


def _rows(path: str) -> list[dict[str, Any]]:
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            text = file.read().decode("utf-8-sig", "replace")
    except tf.errors.OpError as error:
        raise DataError(f"{path} cannot be read: {error.message}") from error
    if path.endswith(".jsonl"):
        return [row for row in map(_json_object, text.splitlines()) if row is not None]
    tab = path.endswith(".tsv") or "\t" in text.partition("\n")[0]
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tab else ",")
    return list(reader)


def _json_object(line: str) -> dict[str, Any] | None:
    """A row; an empty one, which has no picture, where the line holds none."""
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _numbered(labels: Sequence[Any]) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Labels as they are if all are integers, else the numbers of their sorted names."""
    if not labels:
        return None, None
    try:
        return [int(label) for label in labels], None
    except (TypeError, ValueError):
        return _by_name([str(label) for label in labels])


def _by_name(labels: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """The labels' numbers among their sorted names."""
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    return [number[label] for label in labels], tuple(names)


def _of_files(
    spec: str,
    pictures: Sequence[str],
    texts: Sequence[Sequence[Sequence[bytes]]],
    probabilities: Sequence[float],
    labels: Sequence[int] | None,
    label_names: tuple[str, ...] | None,
    captions_are_paths: bool = False,
) -> Source:
    """Every picture is a shard by itself, so that an epoch is one permutation of all of them."""

    def read(shard: int, offset: int, index: int) -> Iterator[Record]:
        del index
        if offset:
            return
        fields: dict[str, Any] = {"path": pictures[shard].encode()}
        fields |= caption_fields(zip(texts[shard], probabilities, strict=False))
        if labels is not None:
            fields["label"] = labels[shard]
        yield Record("", 1, fields, _NOMINAL)

    def parse(fields: Features) -> Features:
        # Read here, by TensorFlow's threads, and not with the record.
        parsed = {key: value for key, value in fields.items() if key != "path"}
        parsed["image"] = tf.io.read_file(fields["path"])
        if captions_are_paths:
            there = fields["weights"] > 0
            parsed["weights"] = tf.boolean_mask(fields["weights"], there)
            files = tf.boolean_mask(fields["captions"], there)
            parsed["captions"] = tf.map_fn(tf.io.read_file, files)
        return parsed

    return Source(
        spec=spec,
        shards=pictures,
        read=read,
        fields=pair_fields("path", labels is not None),
        parse=parse,
        has_captions=any(map(any, texts)),
        label_names=label_names,
        counts=(1,) * len(pictures),
    )
