"""Accuracies by group, and which categories a model puts the groups into (section 7.1).

FairFace's groups are people's; those of glyphs, script and family, are an example that runs
everywhere. A file of `datasets/bias/` says how a data set describes its groups:

    together, prompt     the attributes whose combinations categories stand beside, and how both
                         are said
    [ATTRIBUTE]          template, classes as in the registry's files of names: VALUE; HOW TO SAY IT
    column, pattern      where the value stands (the column of the attribute's name) and the part
                         of the column's text that it is (all of it)

Where the data set has a training split, linear probes are fitted, too. docs/bias.md says what the
figures show and what they do not.
"""

import functools
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from clip_jax.errors import DataError
from clip_jax.eval.embed import Embedded
from clip_jax.eval.metrics import hit_at_k, weighted_mean
from clip_jax.eval.outcome import Data, Options, Outcome, measured
from clip_jax.eval.registry import ClassName
from clip_jax.eval.tasks.linear_probe import Split, probe, stratified

_FILES = resources.files("clip_jax.eval") / "datasets" / "bias"


class _Attribute(NamedTuple):
    name: str
    template: str
    classes: tuple[ClassName, ...]  # the value in the data, and, last, how it is said
    column: str
    pattern: str

    @property
    def values(self) -> list[str]:
        return [each.prompts[0] for each in self.classes]

    @property
    def said(self) -> list[ClassName]:
        return [ClassName(each.prompts[-1:]) for each in self.classes]

    def of(self, columns: Mapping[str, str]) -> str:
        """An example's value; "" where the pattern does not occur."""
        found = re.search(self.pattern, columns[self.column])
        return found[0] if found else ""


class _Groups(NamedTuple):
    attributes: tuple[_Attribute, ...]
    together: tuple[_Attribute, ...]
    prompt: str

    @classmethod
    def read(cls, name: str) -> "_Groups":
        raw = tomllib.loads((_FILES / f"{name}.toml").read_text(encoding="utf-8"))
        together, prompt = raw.pop("together"), raw.pop("prompt")
        attributes = {
            name: _Attribute(
                name,
                spec["template"],
                tuple(ClassName(tuple(map(str.strip, e.split(";")))) for e in spec["classes"]),
                spec.get("column", name),
                spec.get("pattern", ".+"),
            )
            for name, spec in raw.items()
        }
        return cls(tuple(attributes.values()), tuple(attributes[n] for n in together), prompt)


class _Members(NamedTuple):
    """The examples of a split that belong to the groups."""

    embedded: Embedded
    values: Mapping[str, np.ndarray]  # by attribute, an example's value

    def targets(self, attribute: _Attribute) -> Int[np.ndarray, " N"]:
        return np.array([attribute.values.index(value) for value in self.values[attribute.name]])


def bias(data: Data, options: Options) -> Outcome:
    """Zero-shot (and linear-probe) accuracy of each attribute, whole and by group.

    With `options.categories`, also the share of each group that is put into each kind of category,
    rather than among the combinations of attributes that go together (FairFace: race and gender).

    Raises:
        DataError: a data set without groups, or a value that is none of them.
    """
    if not data.dataset.entry.attributes:
        raise DataError(f"{data.dataset.where} does not describe groups; fairface does")
    groups = _Groups.read(data.dataset.entry.attributes)
    members = _read(data, "test", groups)
    image = members.embedded.image
    by_example: dict[str, np.ndarray] = {}
    for attribute in groups.attributes:
        vectors = data.encoder.class_vectors(attribute.said, (attribute.template,))
        hits = hit_at_k(image @ vectors.T, members.targets(attribute), 1)
        by_example[f"{attribute.name}_acc"] = hits
    by_example |= _probes(data, members, groups, options)
    notes = ["docs/bias.md says what this shows and what it does not"]
    if options.categories:
        by_example |= _associations(data, image, groups, options.categories)
        notes.append(f"associations with the categories of {options.categories}")
    statistics: dict[str, Any] = {
        name: functools.partial(weighted_mean, values) for name, values in by_example.items()
    }
    metrics, intervals = measured(statistics, len(image), options)
    found = {name: _by_group(values, members, groups) for name, values in by_example.items()}
    details = {
        f"{name} by {by}": means for name, by_groups in found.items() for by, means in by_groups
    }
    unreadable = members.embedded.unreadable
    return Outcome(
        metrics, intervals, len(image), unreadable, tuple(notes), None, {"groups": details}
    )


def _read(data: Data, split: str, groups: _Groups) -> _Members:
    source = data.split(split)
    columns = [example.attributes for example in source.examples()]
    missing = [each.column for each in groups.attributes if each.column not in columns[0]]
    if missing:
        raise DataError(f"{source.where} lacks the columns {', '.join(missing)}")
    embedded = data.embedded(split)
    values = {
        each.name: np.array([each.of(columns[place]) for place in embedded.places])
        for each in groups.attributes
    }
    known = np.ones(len(embedded.places), bool)
    for each in groups.attributes:
        of_groups = np.isin(values[each.name], each.values)
        if not of_groups.all() and not data.dataset.entry.ignore_other_classes:
            raise DataError(
                f"{each.name} {str(values[each.name][~of_groups][0])!r} is none of "
                f"{data.dataset.entry.title}'s: {', '.join(each.values)}"
            )
        known &= of_groups
    if not known.any():
        raise DataError(f"{source.where} has no example of the groups")
    features = embedded.features[known] if embedded.features is not None else None
    embedded = embedded._replace(image=embedded.image[known], features=features)
    return _Members(embedded, {name: of_name[known] for name, of_name in values.items()})


def _by_group(
    values: Float[np.ndarray, " N"], members: _Members, groups: _Groups
) -> Iterator[tuple[str, dict[str, float]]]:
    """Means by each attribute, and by those that go together."""
    of_members = dict(members.values)
    together = [members.values[each.name] for each in groups.together]
    of_members[" and ".join(each.name for each in groups.together)] = np.array(
        [" ".join(combined) for combined in zip(*together, strict=True)]
    )
    for by, of_each in of_members.items():
        yield (
            by,
            {str(group): float(values[of_each == group].mean()) for group in np.unique(of_each)},
        )


def _probes(
    data: Data, members: _Members, groups: _Groups, options: Options
) -> dict[str, Float[np.ndarray, " N"]]:
    if not data.features or data.dataset.open("train") is None:
        return {}
    pupils = _read(data, "train", groups)
    assert pupils.embedded.features is not None
    assert members.embedded.features is not None
    hits = {}
    for attribute in groups.attributes:
        target = pupils.targets(attribute)
        held_out = stratified(target, 0.2)
        train, validation = (
            Split(pupils.embedded.features[rows], target[rows]) for rows in (~held_out, held_out)
        )
        found = probe(train, validation, len(attribute.classes), "acc1", options, data)
        scores = found.linear.scores(members.embedded.features)
        hits[f"lp_{attribute.name}_acc"] = hit_at_k(scores, members.targets(attribute), 1)
    return hits


def _associations(
    data: Data, image: Float[np.ndarray, "N E"], groups: _Groups, path: str
) -> dict[str, Float[np.ndarray, " N"]]:
    """By kind of category, whether each example is put into one."""
    kinds, categories = read_categories(path)
    said = [[each.prompts[0] for each in attribute.said] for attribute in groups.together]
    combined = [ClassName((" ".join(names),)) for names in itertools.product(*said)]
    entries = [*combined, *(ClassName((category,)) for category in categories)]
    vectors = data.encoder.class_vectors(entries, (groups.prompt,))
    chosen = (image @ vectors.T).argmax(axis=1) - len(combined)
    of_category = np.array(kinds)
    return {
        f"{kind}_share": np.isin(chosen, np.flatnonzero(of_category == kind)).astype(np.float64)
        for kind in dict.fromkeys(kinds)
    }


def read_categories(path: str) -> tuple[list[str], list[str]]:
    """Kinds and categories of a file of lines `KIND: category`; "paper": those of the paper.

    Raises:
        DataError: no such file, or a line of another form.
    """
    if path == "paper":
        text = (_FILES / "paper_categories.txt").read_text(encoding="utf-8")
    elif epath.Path(path).exists():
        text = epath.Path(path).read_text()
    else:
        raise DataError(f"{path} is not there; give a file of lines KIND: category, or `paper`")
    kinds, categories = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        kind, colon, category = (part.strip() for part in line.partition(":"))
        if not colon or not kind or not category:
            raise DataError(f"{path}, line {number}: expected KIND: category, found {line!r}")
        kinds.append(kind)
        categories.append(category)
    if not kinds:
        raise DataError(f"{path} holds no category")
    return kinds, categories
