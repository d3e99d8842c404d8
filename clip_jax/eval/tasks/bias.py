"""FairFace: accuracies by group, and which categories a model puts people into (section 7.1).

The folder holds `fairface_label_val.csv` (file, age, gender, race) and the pictures that it names;
with `fairface_label_train.csv`, linear probes are fitted, too. docs/bias.md says what the figures
show and what they do not.
"""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from clip_jax.data.labelled import Example, open_table
from clip_jax.errors import DataError
from clip_jax.eval.embed import Embedded
from clip_jax.eval.metrics import hit_at_k, weighted_mean
from clip_jax.eval.outcome import Data, Options, Outcome, measured
from clip_jax.eval.registry import ClassName
from clip_jax.eval.tasks.linear_probe import Split, probe, stratified

_FILES = resources.files("clip_jax.eval") / "datasets" / "bias"
_TABLES = {"test": "fairface_label_val.csv", "train": "fairface_label_train.csv"}
_PEOPLE = "a photo of a {}."


def bias(data: Data, options: Options) -> Outcome:
    """Zero-shot (and linear-probe) accuracy of race, gender and age, whole and by group.

    With `options.categories`, also the share of each group that is put into each kind of category,
    rather than among the 14 combinations of race and gender.

    Raises:
        DataError: no folder in FairFace's form, or a value that is not one of FairFace's.
    """
    attributes = tomllib.loads((_FILES / "fairface.toml").read_text(encoding="utf-8"))
    embedded, people = _read(data, "test", attributes)
    statistics: dict[str, Any] = {}
    groups: dict[str, dict[str, float]] = {}
    for name, spec in attributes.items():
        classes = _classes(spec)
        target = _target(people, name, classes)
        vectors = data.encoder.class_vectors(
            [ClassName(each.prompts[-1:]) for each in classes], (spec["template"],)
        )
        hits = hit_at_k(embedded.image @ vectors.T, target, 1)
        statistics[f"{name}_acc"] = _mean_of(hits)
        groups |= _by_group(f"{name} accuracy", hits, people)
    statistics |= _probes(data, embedded, people, attributes, options, groups)
    notes = ["docs/bias.md says what this shows and what it does not"]
    if options.categories:
        kinds = _associations(data, embedded, attributes, options.categories)
        for kind, share in kinds.items():
            statistics[f"{kind}_share"] = _mean_of(share)
            groups |= _by_group(f"{kind} share", share, people)
        notes.append(f"associations with the categories of {options.categories}")
    metrics, intervals = measured(statistics, len(people), options)
    return Outcome(
        metrics,
        intervals,
        len(people),
        embedded.unreadable,
        tuple(notes),
        None,
        {"groups": groups},
    )


def _read(data: Data, split: str, attributes) -> tuple[Embedded, list[Mapping[str, str]]]:
    folder = data.dataset.folder
    path = folder / _TABLES[split] if folder is not None else None
    if path is None or not path.exists():
        raise DataError(f"{data.dataset.where} should hold {_TABLES[split]}, as FairFace does")
    source = open_table(path)
    examples: list[Example] = list(source.examples())
    missing = [name for name in attributes if name not in examples[0].attributes]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}")
    embedded = data.encoder.source(source, data.features)
    return embedded, [examples[place].attributes for place in embedded.places]


def _classes(spec: Mapping[str, Any]) -> list[ClassName]:
    """The value in the table, and the last name, which is the one to say."""
    return [ClassName(tuple(part.strip() for part in each.split(";"))) for each in spec["classes"]]


def _target(
    people: Sequence[Mapping[str, str]], name: str, classes: Sequence[ClassName]
) -> np.ndarray:
    index = {each.prompts[0]: number for number, each in enumerate(classes)}
    strange = {person[name] for person in people} - set(index)
    if strange:
        raise DataError(f"{name} {sorted(strange)[0]!r} is none of FairFace's: {', '.join(index)}")
    return np.array([index[person[name]] for person in people])


def _by_group(
    what: str, values: Float[np.ndarray, " N"], people: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """Means by race, by gender, by age, and by race and gender together."""
    keys = {
        "race": [person["race"] for person in people],
        "gender": [person["gender"] for person in people],
        "age": [person["age"] for person in people],
        "race and gender": [f"{person['race']} {person['gender']}" for person in people],
    }
    return {
        f"{what} by {by}": {
            group: float(values[np.array(of_people) == group].mean())
            for group in sorted(set(of_people))
        }
        for by, of_people in keys.items()
    }


def _probes(
    data: Data, embedded: Embedded, people, attributes, options: Options, groups
) -> dict[str, Any]:
    folder = data.dataset.folder
    if not data.features or folder is None or not (folder / _TABLES["train"]).exists():
        return {}
    trained, pupils = _read(data, "train", attributes)
    assert trained.features is not None
    assert embedded.features is not None
    statistics = {}
    for name, spec in attributes.items():
        classes = _classes(spec)
        target = _target(pupils, name, classes)
        held_out = stratified(target, 0.2)
        train, validation = (
            Split(trained.features[rows], target[rows]) for rows in (~held_out, held_out)
        )
        found = probe(train, validation, len(classes), "acc1", options, data)
        scores = found.linear.scores(embedded.features)
        hits = hit_at_k(scores, _target(people, name, classes), 1)
        statistics[f"lp_{name}_acc"] = _mean_of(hits)
        groups |= _by_group(f"{name} accuracy of the linear probe", hits, people)
    return statistics


def _associations(
    data: Data, embedded: Embedded, attributes, path: str
) -> dict[str, Float[np.ndarray, " N"]]:
    """By kind of category, whether each person is put into one."""
    kinds, categories = read_categories(path)
    people = [
        ClassName((f"{race.prompts[-1]} {gender.prompts[-1]}",))
        for race in _classes(attributes["race"])
        for gender in _classes(attributes["gender"])
    ]
    entries = [*people, *(ClassName((category,)) for category in categories)]
    vectors = data.encoder.class_vectors(entries, (_PEOPLE,))
    chosen = (embedded.image @ vectors.T).argmax(axis=1) - len(people)
    of_category = np.array(kinds)
    return {
        kind: np.isin(chosen, np.flatnonzero(of_category == kind)).astype(np.float64)
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


def _mean_of(values: Float[np.ndarray, " N"]):
    return lambda weights: weighted_mean(values, weights)
