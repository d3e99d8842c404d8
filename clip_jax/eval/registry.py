"""The registry of evaluation sets: `datasets/*.toml`, class names and the paper's figures.

A set is a TOML file:

    title, homepage, license, note
    tasks                    what it is asked by default; keys of `clip_jax.eval.TASKS`
    metric                   the one the paper reports
    suites                   groups that it belongs to, such as paper27
    classes                  the file of `datasets/classes/` with its class names
    templates                prompts, {} standing for a class name; or templates_of = another set
    folders                  what its folder may be called under --data_dir, beside its own name
    tables                   split -> the table in that folder, where it has a name of its own
    attributes               the file of `datasets/bias/` that describes its groups
    [replaced_words]         by kind, two words; each in the other's place makes a caption wrong
    [tfds]                   name (or names, whose results are averaged), the split that each of
                             train, validation, test means there, and how `labels` are derived
    [paper_examples]         the sizes of the paper's splits
    no_figure                why the paper has no figure of it

A file of class names holds a class a line: `NAME; NAME | KEY | KEY`. The names go into the prompts;
names and keys are what the data may call the class. Names are compared without case, spaces and
punctuation, and the order of the lines is nothing that anybody relies on.
"""

import dataclasses
import functools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from clip_jax.errors import DataError

_FILES = resources.files("clip_jax.eval") / "datasets"
PLAIN_TEMPLATE = "a photo of a {}."  # where nobody gives a template


class ClassName(NamedTuple):
    """A class: the names that prompts say, and what else the data may call it."""

    prompts: tuple[str, ...]
    keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvalDataset:
    """One evaluation set; see the module's docstring.

    Attributes:
        candidates: "all" classes are to choose from, or those "present" in the split.
        ignore_other_classes: examples of classes that are not in `classes` are left out, and, of
            attributes, those of other values.
        figures: the paper's, in per cent: by task, by model.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    templates: tuple[str, ...] = ()
    classes: tuple[ClassName, ...] = ()
    candidates: str = "all"
    ignore_other_classes: bool = False
    suites: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attributes: str = ""
    replaced_words: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    tfds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    homepage: str = ""
    license: str = ""
    note: str = ""
    no_figure: str = ""
    class_count: int = 0
    paper_classes: int = 0
    paper_examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def read_classes(text: str, where: str) -> tuple[ClassName, ...]:
    """Reads a file of class names.

    Raises:
        DataError: a line without a name, or no line at all.
    """
    classes = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        names, *keys = (part.strip() for part in line.split("|"))
        prompts = tuple(name.strip() for name in names.split(";") if name.strip())
        if not prompts:
            raise DataError(f"{where}, line {number}: no class name in {line!r}")
        classes.append(ClassName(prompts, tuple(key for key in keys if key)))
    if not classes:
        raise DataError(f"{where} holds no class name")
    return tuple(classes)


def read_templates(text: str, where: str) -> tuple[str, ...]:
    """Reads prompt templates, one a line; the class name goes where {} or {c} stands.

    Raises:
        DataError: a line without a place for the name, or no line at all.
    """
    templates = [line.strip().replace("{c}", "{}") for line in text.splitlines() if line.strip()]
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(f"{where}: the template {template!r} needs {{}} once, for the name")
    if not templates:
        raise DataError(f"{where} holds no template")
    return tuple(templates)


def match_classes(
    names: Sequence[str], classes: Sequence[ClassName], where: str
) -> Int[np.ndarray, " L"]:
    """Finds the class of each name of the data.

    Args:
        names: what the data calls its labels, in the order of the labels.
        classes: those of the registry or of the user.
        where: the data, for the message.

    Returns:
        The index of the class for each label; -1: none of them.

    Raises:
        DataError: a class that the data does not have, or has twice.
    """
    exact: dict[str, set[int]] = {}
    plain: dict[str, set[int]] = {}
    for index, entry in enumerate(classes):
        for key in (*entry.prompts, *entry.keys):
            exact.setdefault(key, set()).add(index)
            plain.setdefault(_plain(key), set()).add(index)
    found = []
    for position, name in enumerate(names):
        candidates = exact.get(name) or plain.get(_plain(name)) or set()
        if len(candidates) > 1 and position in candidates and len(names) == len(classes):
            candidates = {position}  # "sunglasses" twice in ImageNet: then the order must tell
        found.append(next(iter(candidates)) if len(candidates) == 1 else -1)
    labels = np.array(found, np.int64)
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    faults = [
        f"{entry.prompts[0]!r} is {'missing' if not count else 'there twice'}"
        for entry, count in zip(classes, counts, strict=True)
        if count != 1
    ]
    if faults:
        strangers = [name for name, label in zip(names, labels, strict=True) if label < 0]
        raise DataError(
            f"the class names do not match the labels of {where}: {_some(faults)}. Labels without "
            f"a class: {_some(map(repr, strangers))}. Give a line NAME | LABEL for each label "
            "(--classnames=FILE, or classnames.txt in the folder)"
        )
    return labels


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _some(items: Iterable[str], limit: int = 8) -> str:
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest if items else "none"


@functools.cache
def _file(path: str) -> str:
    return (_FILES / path).read_text(encoding="utf-8")


@functools.cache
def datasets() -> Mapping[str, EvalDataset]:
    """All sets of the registry by name."""
    raw = {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text(encoding="utf-8"))
        for file in sorted(_FILES.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    }
    figures = json.loads(_file("paper_figures.json"))
    entries = {}
    for name, values in raw.items():
        templates_of = raw[values.pop("templates_of", name)]
        values["templates"] = templates_of.get("templates", ())
        if "classes" in values:
            path = f"classes/{values['classes']}.txt"
            values["classes"] = read_classes(_file(path), path)
        fields: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        entries[name] = EvalDataset(name=name, figures=figures.get(name, {}), **fields)
    return entries


def suites() -> Mapping[str, tuple[str, ...]]:
    """The suites: their names and their sets."""
    members: dict[str, tuple[str, ...]] = {}
    for name, entry in datasets().items():
        for suite in entry.suites:
            members[suite] = (*members.get(suite, ()), name)
    return members
