"""Finds an evaluation set under --data_dir, in whichever form the user holds it."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from clip_jax.data.labelled import Labelled, open_folder, open_table
from clip_jax.errors import DataError
from clip_jax.eval.registry import (
    PLAIN_TEMPLATE,
    ClassName,
    EvalDataset,
    datasets,
    match_classes,
    read_classes,
    read_templates,
)

_CLASSNAMES = "classnames.txt"
_TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")


@dataclasses.dataclass(frozen=True)
class Classes:
    """What zero-shot chooses from.

    Attributes:
        entries: the classes.
        of_label: the class of each label of the data; -1: none of them.
    """

    entries: tuple[ClassName, ...]
    of_label: Int[np.ndarray, " L"]

    @property
    def names(self) -> list[str]:
        """One name a class, for people."""
        return [entry.prompts[0] for entry in self.entries]


@dataclasses.dataclass(frozen=True)
class OpenDataset:
    """An evaluation set that was found.

    Attributes:
        entry: of the registry, or made up for the user's own folder.
        where: for messages.
        open: a split -> its examples, or None.
        folder: where it was found; None: in TFDS.
    """

    entry: EvalDataset
    where: str
    open: Callable[[str], Labelled | None]
    folder: epath.Path | None = None

    @property
    def own(self) -> bool:
        """Whether it is the user's, not one of the registry."""
        return self.entry.name not in datasets()

    def split(self, name: str) -> Labelled:
        """The examples of a split.

        Raises:
            DataError: it is not there.
        """
        found = self.open(name)
        if found is None:
            table = self.entry.tables.get(name)
            expected = f", as {self.entry.title} has it in {table}" if table else ""
            raise DataError(f"{self.where} has no split {name!r}, which the task needs{expected}")
        return found

    def classes(self, source: Labelled) -> Classes:
        """The classes, and which label of the source is which.

        Raises:
            DataError: labels without names, or names that do not match.
        """
        names = source.label_names
        if names is None:
            if not self.entry.classes:
                raise DataError(f"{source.where} has no labels with names, which the task needs")
            # Bare numbers, as in a WebDataset folder without classnames.txt: no order is trusted.
            raise DataError(
                f"{source.where} says nowhere what its labels stand for; write {_CLASSNAMES} "
                "beside its splits, a name a line, in the order of the labels"
            )
        entries = self.entry.classes or _as_classes(names)
        if self.entry.candidates == "present":
            return Classes(entries, np.arange(len(names)))
        return Classes(entries, match_classes(names, entries, source.where))


def _as_classes(names: Sequence[str]) -> tuple[ClassName, ...]:
    return tuple(ClassName((name.replace("_", " ").strip(),), (name,)) for name in names)


def find(
    name: str,
    data_dir: str | None,
    classnames: str | None = None,
    templates: str | None = None,
) -> Sequence[OpenDataset]:
    """Finds a data set: its folder, or what TFDS has prepared.

    Args:
        name: of the registry, of a folder under `data_dir`, or a path.
        data_dir: where data sets are; None: TFDS's default directory.
        classnames: a file to use instead of the class names.
        templates: likewise, of the templates.

    Returns:
        The data set; several where the paper averages over several (UCF101's three splits).

    Raises:
        DataError: it is not there; the message says what was looked for and how to get it.
    """
    entry = datasets().get(name)
    looked: list[str] = []
    for folder in _folders(name, entry, data_dir):
        if folder.is_dir():
            own = entry or _own_entry(name, folder)
            opener = functools.partial(_open_split, folder, own.tables)
            found: Sequence[OpenDataset] = [OpenDataset(own, str(folder), opener, folder)]
            break
        looked.append(f"{folder}/")
    else:
        found = _in_tfds(entry, data_dir, looked) if entry else ()
    if not found:
        raise DataError(_not_there(name, entry, looked))
    return [
        dataclasses.replace(one, entry=_overridden(one.entry, classnames, templates))
        for one in found
    ]


def _folders(name: str, entry: EvalDataset | None, data_dir: str | None) -> Iterator[epath.Path]:
    if entry is None and ("/" in name or data_dir is None):
        yield epath.Path(name).expanduser()
    if data_dir is not None:
        for folder in (name, *(entry.folders if entry else (f"wds_{name}",))):
            # A folder of that name that TFDS has written holds numbered versions, no pictures.
            path = epath.Path(data_dir).expanduser() / folder
            if entry is None or not _is_tfds(path):
                yield path


def _open_split(folder: epath.Path, tables: Mapping[str, str], split: str) -> Labelled | None:
    if not tables:
        return open_folder(folder, split)
    path = folder / tables[split] if split in tables else None
    return open_table(path) if path is not None and path.exists() else None


def _is_tfds(path: epath.Path) -> bool:
    if not path.is_dir():
        return False
    below = [*path.glob("*.*.*"), *path.glob("*/*.*.*")]
    return any((child / "dataset_info.json").exists() for child in below)


def _in_tfds(entry: EvalDataset, data_dir: str | None, looked: list[str]) -> Sequence[OpenDataset]:
    if not entry.tfds:
        return ()
    from clip_jax.data.labelled_tfds import open_tfds

    name, labels = entry.tfds["name"], entry.tfds.get("labels", "")
    names = [name] if isinstance(name, str) else name

    def opener(name: str) -> Callable[[str], Labelled | None]:
        def open_split(split: str) -> Labelled | None:
            there = entry.tfds.get(split)
            return open_tfds(name, there, data_dir, labels) if there else None

        return open_split

    found = [OpenDataset(entry, f"tfds:{name}", opener(name)) for name in names]
    found = [one for one in found if one.open("test") is not None]
    if len(found) < len(names):
        there = [one.where for one in found]
        missing = [f"tfds:{name}" for name in names if f"tfds:{name}" not in there]
        looked += [f"{one} in {data_dir or 'the default directory of TFDS'}" for one in missing]
        return ()
    return found


def _own_entry(name: str, folder: epath.Path) -> EvalDataset:
    """An entry for a folder of the user's."""
    source = open_folder(folder, "test")
    if source is None:
        raise DataError(f"{folder} has no test, validation or val split")
    first = next(source.examples(), None)
    if first is None:
        raise DataError(f"{source.where} holds no example")
    tasks, metric = list[str](), "acc1"
    if first.label is not None:
        tasks.append("zero_shot")
        if np.ndim(first.label):
            metric = "mean_average_precision"
        if open_folder(folder, "train") is not None:
            tasks.append("linear_probe")
            tasks += [] if np.ndim(first.label) else ["few_shot"]
    if first.captions:
        tasks.append("retrieval")
        metric = metric if first.label is not None else "text_retrieval_recall@1"
    if not tasks:
        raise DataError(f"{source.where} has neither labels nor captions")
    label = os.path.basename(name.rstrip("/")) or name
    # Of the test split, so that the labels of the others are matched to them by name.
    classes = _as_classes(source.label_names or ())
    if (folder / _CLASSNAMES).exists():
        classes = _read(folder / _CLASSNAMES, read_classes)
    templates: tuple[str, ...] = (PLAIN_TEMPLATE,)
    for file in _TEMPLATES:
        if (folder / file).exists():
            templates = _read(folder / file, read_templates)
            break
    return EvalDataset(label, label, tuple(tasks), metric, templates, classes)


def _overridden(entry: EvalDataset, classnames: str | None, templates: str | None) -> EvalDataset:
    if classnames:
        classes = _read(epath.Path(classnames).expanduser(), read_classes)
        entry = dataclasses.replace(entry, classes=classes, candidates="all")
    if templates:
        found = _read(epath.Path(templates).expanduser(), read_templates)
        entry = dataclasses.replace(entry, templates=found)
    return entry


def _read(path: epath.Path, read: Callable):
    if not path.exists():
        raise DataError(f"{path} is not there")
    return read(path.read_text(encoding="utf-8"), str(path))


def _not_there(name: str, entry: EvalDataset | None, looked: Sequence[str]) -> str:
    message = f"no data set {name!r}; looked for " + (", ".join(looked) or f"{name}/")
    if entry is None:
        known = ", ".join(datasets())
        return (
            f"{message}. Give --data_dir and the name of a folder there (train/, test/ of class "
            f"folders, a WebDataset folder, or a table), or one of: {known}"
        )
    ways = []
    if entry.tfds:
        name = entry.tfds["name"]
        names = name if isinstance(name, str) else " ".join(name)
        ways.append(f"`tfds build {names} --data_dir=DATA_DIR`")
    ways += [
        f"the WebDataset folder {folder}/ as LAION's CLIP_benchmark has it"
        for folder in entry.folders[:1]
    ]
    ways.append(f"{entry.name}/ with train/ and test/ of class folders, or with test.csv")
    note = f" {entry.note}" if not entry.folders and not entry.tfds else ""
    return f"{message}. To have it: {'; or '.join(ways)}. {entry.title}: {entry.homepage}.{note}"
