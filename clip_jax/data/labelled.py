"""Labelled and captioned pictures for evaluation, from the forms in which people keep them.

A folder may hold, for each split:

    SPLIT/nshards.txt, SPLIT/0.tar    WebDataset, as LAION's CLIP_benchmark writes it: a picture
                                      with .cls (a number), .npy (of several labels) or .txt (a
                                      caption a line); classnames.txt beside the splits
    SPLIT/CLASS/*.jpg                 a folder for each class
    SPLIT.csv, SPLIT.jsonl            a table: file, and label or captions; other columns are kept
                                      as attributes

Without folders or files that are called after a split, the whole is the test split. Local or gs://.
TFDS is read by `clip_jax.data.labelled_tfds`. Nothing here decodes a picture.
"""

import csv
import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clip_jax.errors import DataError

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test", "validation", "val"),
}
IMAGE_SUFFIXES = frozenset(
    ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2"]
)
_TABLES = ("csv", "jsonl")
_FILE_COLUMNS = ("file", "filepath", "filename", "image", "path")
_LABEL_COLUMNS = ("label", "class", "label_name")
_CAPTION_COLUMNS = ("captions", "caption", "title", "text")


class Example(NamedTuple):
    """A picture and what is said of it."""

    where: str  # for messages
    image: Callable[[], bytes]  # reads the encoded picture
    label: Any = None  # an index of `label_names`; or, of several labels, int [C]: 1, 0, -1
    captions: tuple[str, ...] = ()
    attributes: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A split of an evaluation set.

    Attributes:
        where: for messages.
        examples: iterates over all of them, always in the same order.
        label_names: what the labels stand for; None where there are none.
        sizes: examples of each label, where that is known without reading.
    """

    where: str
    examples: Callable[[], Iterator[Example]]
    label_names: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None


def open_folder(folder: epath.Path, split: str) -> Labelled | None:
    """Opens a split of a folder, or None where the folder does not have it.

    Args:
        folder: see the module's docstring.
        split: "train", "validation" or "test".

    Raises:
        DataError: what is there is empty or not in one of the forms above.
    """
    if split == "validation" and not _has(folder, "test"):
        return None  # it stands for the test
    for name in SPLITS[split]:
        if (folder / name / "nshards.txt").exists():
            return _open_tars(folder, name)
        if (folder / name).is_dir():
            return _open_class_folders(folder / name)
        for suffix in _TABLES:
            if (folder / f"{name}.{suffix}").exists():
                return open_table(folder / f"{name}.{suffix}")
    if split != "test":
        return None
    tables = [file for file in folder.iterdir() if file.suffix.lstrip(".") in _TABLES]
    if len(tables) == 1:
        return open_table(tables[0])
    if tables:
        names = ", ".join(sorted(table.name for table in tables))
        raise DataError(f"{folder} holds several tables ({names}); call one test{tables[0].suffix}")
    return None if _has(folder, "train") else _open_class_folders(folder)


def _has(folder: epath.Path, name: str) -> bool:
    files = (folder / f"{name}.{suffix}" for suffix in _TABLES)
    return (folder / name).is_dir() or any(file.exists() for file in files)


def is_image(path: str) -> bool:
    """Whether a file's name is that of a picture."""
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def images_below(folder: epath.Path) -> list[epath.Path]:
    """The pictures in a folder and its folders, by name; hidden ones are left out."""
    found: list[epath.Path] = []
    for child in sorted(folder.iterdir(), key=lambda child: child.name):
        if child.name.startswith("."):
            continue
        if is_image(child.name):
            found.append(child)
        elif child.is_dir():
            found += images_below(child)
    return found


def _open_class_folders(folder: epath.Path) -> Labelled:
    classes = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    )
    files = [images_below(folder / name) for name in classes]
    if not any(files):
        raise DataError(
            f"{folder} holds no picture in folders of classes; expected CLASS/*.jpg (or .png, "
            ".webp ...), or, one folder up, train/, validation/ and test/ of such folders"
        )
    pairs = [(file, label) for label, found in enumerate(files) for file in found]

    def examples() -> Iterator[Example]:
        for file, label in pairs:
            yield Example(str(file), file.read_bytes, label)

    sizes = tuple(len(found) for found in files)
    return Labelled(str(folder), examples, tuple(classes), sizes)


def _open_tars(folder: epath.Path, split: str) -> Labelled:
    shards = (folder / split / "nshards.txt").read_text().strip()
    if not shards.isdigit():
        raise DataError(f"{folder / split / 'nshards.txt'} should hold a number, not {shards!r}")
    paths = [folder / split / f"{number}.tar" for number in range(int(shards))]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        raise DataError(
            f"{folder / split} should have {shards} shards by nshards.txt; missing: "
            f"{', '.join(missing[:5]) or 'all'}"
        )

    def examples() -> Iterator[Example]:
        for path in paths:
            for key, members in _groups(path):
                yield _of_members(f"{path}:{key}", members)

    names = folder / "classnames.txt"
    label_names = None
    if names.exists():
        label_names = tuple(line.strip() for line in names.read_text().splitlines() if line.strip())
    return Labelled(str(folder / split), examples, label_names)


def _groups(path: epath.Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of a tar that share a key, by suffix."""
    key, members = "", dict[str, bytes]()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                directory, _, base = member.name.rpartition("/")
                name, _, suffix = base.partition(".")
                stem = f"{directory}/{name}"
                if stem != key and members:
                    yield key, members
                    members = {}
                content = tar.extractfile(member)
                assert content is not None
                key, members[suffix.lower()] = stem, content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if members:
        yield key, members


def _of_members(where: str, members: dict[str, bytes]) -> Example:
    image = next((members[s] for s in members if s in IMAGE_SUFFIXES), None)
    if image is None:
        raise DataError(f"{where} holds {', '.join(members)}, but no picture")
    if "cls" in members:
        text = members["cls"].decode().strip()
        if not text.isdigit():
            raise DataError(f"{where}: .cls should hold the number of a class, not {text!r}")
        return Example(where, lambda: image, int(text))
    if "npy" in members:
        labels = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
        return Example(where, lambda: image, labels.astype(np.int64))
    if "txt" in members:
        lines = members["txt"].decode("utf-8").splitlines()
        return Example(where, lambda: image, captions=tuple(line for line in lines if line))
    raise DataError(f"{where} has neither .cls, .npy nor .txt beside its picture")


def read_table(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a CSV with a heading, or of JSON objects, one a line.

    Raises:
        DataError: no row, or a line that is not JSON.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no row")
    return rows


def open_table(path: epath.Path) -> Labelled:
    """Opens a table of pictures.

    Raises:
        DataError: no row, or no column with the pictures' files.
    """
    rows = read_table(path)

    def column(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in rows[0]), None)

    file, label, caption = map(column, (_FILE_COLUMNS, _LABEL_COLUMNS, _CAPTION_COLUMNS))
    if file is None:
        raise DataError(
            f"{path} has the columns {', '.join(rows[0])}; the pictures should be in one called "
            f"{', '.join(_FILE_COLUMNS[:-1])} or {_FILE_COLUMNS[-1]}"
        )
    names: list[str] = []
    if label is not None:
        names = sorted({str(row[label]) for row in rows})
    index = {name: number for number, name in enumerate(names)}

    def examples() -> Iterator[Example]:
        for row in rows:
            captions = row[caption] if caption else ()
            yield Example(
                where=str(path.parent / row[file]),
                image=(path.parent / row[file]).read_bytes,
                label=index[str(row[label])] if label else None,
                captions=(captions,) if isinstance(captions, str) else tuple(captions),
                attributes={key: value for key, value in row.items() if isinstance(value, str)},
            )

    return Labelled(str(path), examples, tuple(names) or None)
