"""Evaluates one model on many data sets, skips what is done, and leaves the results."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from clip_jax.data.labelled import Labelled
from clip_jax.errors import DataError
from clip_jax.eval import charts, evaluate
from clip_jax.eval.embed import Encoder, decode
from clip_jax.eval.opening import OpenDataset, find
from clip_jax.eval.outcome import Options, Outcome, Predictions
from clip_jax.eval.page import write_page
from clip_jax.eval.results import Results, fingerprint, paper_figures
from clip_jax.eval.robustness import draw_robustness
from clip_jax.eval.tables import results_table
from clip_jax.eval.tasks import NEED_TRAIN
from clip_jax.preprocess import Preprocess

_PICTURES = 12  # hits in the report, and as many misses
_THUMBNAIL = 128  # pixels


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        datasets: names; see `opening.find`.
        tasks: none: all that a data set is for and that need no training split.
        data_dir: where the data sets are.
        classnames: a file to use instead of the data set's.
        templates: likewise.
        tolerant: sets that are not there are listed at the end, the others are evaluated.
        overwrite: also what is done already.
        options: of the tasks.
    """

    datasets: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None
    classnames: str | None = None
    templates: str | None = None
    tolerant: bool = False
    overwrite: bool = False
    options: Options = dataclasses.field(default_factory=Options)


def run(request: Request, encoder: Encoder, results: Results, say: Callable[[str], None]) -> None:
    """Evaluates, writes each result as soon as it is there, and closes with tables and a page.

    Args:
        request: see there.
        encoder: the model.
        results: where they go; all hosts must see the same directory.
        say: prints a line, on one host.

    Raises:
        DataError: a data set that is not there; with `tolerant`, after all the others.
    """
    weights = fingerprint(encoder.model)
    missing: list[str] = []
    for name in request.datasets:
        try:
            opened = find(name, request.data_dir, request.classnames, request.templates)
        except DataError as error:
            if not request.tolerant:
                raise
            missing.append(str(error))
            continue
        _run_one(name, opened[0], request, encoder, results, weights, say)
    if jax.process_index() == 0:
        rows = list(results.read())
        if rows:
            results.collect()
            _draw_across(rows, results)
            write_page(results, rows)
            say(results_table(rows))
            say(f"\nresults  {results.directory / 'results.json'}")
            say(f"report   {results.directory / 'report.html'}")
    if missing:
        raise DataError(
            f"{len(missing)} of {len(request.datasets)} sets are not there:\n  "
            + "\n  ".join(missing)
        )


def _run_one(
    name: str,
    opened: OpenDataset,
    request: Request,
    encoder: Encoder,
    results: Results,
    weights: str,
    say: Callable[[str], None],
) -> None:
    entry = opened.entry
    tasks = request.tasks or tuple(task for task in entry.tasks if task not in NEED_TRAIN)
    settings = {
        "weights": weights,
        "data": opened.where,
        "templates": list(entry.templates),
        "classes": [list(each.prompts) for each in entry.classes],
        "options": dataclasses.asdict(request.options),
    }
    label = entry.name
    done = {
        task: not request.overwrite and _agreed(results.finished(label, task, settings))
        for task in tasks
    }
    for task in (task for task in tasks if done[task]):
        say(f"{label}, {task}: done before (--overwrite does it again)")
    left = [task for task in tasks if not done[task]]
    if not left:
        return
    say(f"{label}: {', '.join(left)} ...")
    outcomes = evaluate(
        encoder,
        name,
        tasks=left,
        data_dir=request.data_dir,
        classnames=request.classnames,
        templates=request.templates,
        options=request.options,
    )
    if jax.process_index() != 0:
        return
    for task, outcome in outcomes.items():
        if outcome.unreadable:
            say(f"{label}, {task}: {outcome.unreadable} unreadable pictures were left out")
        details = {
            "title": entry.title,
            "metric": ("lp_" if task == "linear_probe" else "") + entry.metric,
            "intervals": outcome.intervals,
            "paper": paper_figures(entry, task, encoder.model.config),
            "examples": outcome.examples,
            "unreadable": outcome.unreadable,
            "notes": [note for note in (*outcome.notes, entry.note) if note],
            "details": outcome.details,
            "settings": settings,
        }
        row = results.row(label, task, encoder.model, outcome)
        figures = _figures(outcome, opened, encoder.preprocess)
        results.write(results.key(label, task), row, details, figures)


def _figures(
    outcome: Outcome, opened: OpenDataset, preprocess: Preprocess
) -> dict[str, charts.Figure]:
    figures: dict[str, charts.Figure] = {}
    predictions = outcome.predictions
    if predictions is not None:
        chosen = predictions.probabilities.argmax(axis=1)
        right = chosen == predictions.target
        probability = predictions.probabilities.max(axis=1)
        source = opened.split("test")
        pictures = _hits_and_misses(predictions, chosen, source, preprocess)
        if pictures is not None:
            figures["pictures"] = pictures
        names = predictions.names
        figures["confusion"] = charts.confusion_matrix(predictions.target, chosen, names)
        figures["classes"] = charts.class_bars(predictions.target, right, names)
        figures["calibration"] = charts.reliability(probability, right)
    if "groups" in outcome.details:
        figures["groups"] = charts.groups(outcome.details["groups"])
    if "by_shots" in outcome.details:
        figures["shots"] = charts.shots(
            outcome.details["by_shots"],
            outcome.details["zero_shot"],
            opened.entry.metric,
            next(note for note in outcome.notes if note.startswith("zero-shot")),
        )
    return figures


def _hits_and_misses(
    predictions: Predictions, chosen: np.ndarray, source: Labelled, preprocess: Preprocess
) -> charts.Figure | None:
    """Some hits, always the same ones, and the misses that the model was surest of."""
    right = chosen == predictions.target
    sure = predictions.probabilities.max(axis=1)
    random = np.random.default_rng(0)
    target = predictions.target
    hits = _of_different_classes(random.permutation(np.flatnonzero(right)), target)
    misses = np.flatnonzero(~right)
    misses = misses[np.argsort(-sure[misses], kind="stable")]
    rows = np.concatenate([hits, _of_different_classes(misses, target)])
    wanted = {int(predictions.places[row]): row for row in rows}
    thumbnail = dataclasses.replace(preprocess, size=_THUMBNAIL)
    pixels: dict[int, np.ndarray] = {}
    for place, example in enumerate(source.examples()):
        if place in wanted:
            picture = decode(example.image(), thumbnail)
            if picture is not None:
                pixels[wanted[place]] = picture
        if len(pixels) == len(wanted):
            break
    shown = [row for row in rows if row in pixels]
    if not shown:
        return None
    names = predictions.names
    return charts.hits_and_misses(
        [pixels[row] for row in shown],
        [names[predictions.target[row]] for row in shown],
        [names[chosen[row]] for row in shown],
        [float(sure[row]) for row in shown],
    )


def _of_different_classes(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The first rows: each class once, then each a second time, as far as they are needed."""
    seen: dict[int, int] = {}
    turn = []
    for row in rows:
        seen[target[row]] = seen.get(target[row], -1) + 1
        turn.append(seen[target[row]])
    return rows[np.argsort(turn, kind="stable")[:_PICTURES]]


def _draw_across(rows: Sequence[tuple[str, dict[str, Any], Mapping[str, Any]]], results) -> None:
    """The figures that compare data sets: zero-shot with linear probe, and robustness."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for _, row, details in rows:
        value = row["metrics"].get(details["metric"])
        if value is not None:
            of_model = scores.setdefault(row["pretrained"], {})
            of_model.setdefault(row["task"], {})[row["dataset"]] = value
    for number, (model, by_task) in enumerate(scores.items()):
        zero, probe = (
            by_task.get(name, {}) for name in ("zeroshot_classification", "linear_probe")
        )
        both = {name: 100 * (zero[name] - probe[name]) for name in zero if name in probe}
        if both:
            figure = charts.zero_shot_versus_probe(both, model)
            results.draw(f"across--zero_shot_versus_linear_probe-{number}", figure)
    zero_shot = {m: by_task.get("zeroshot_classification", {}) for m, by_task in scores.items()}
    robustness = draw_robustness(zero_shot)
    if robustness is not None:
        results.draw("across--robustness", robustness)


def _agreed(here: bool) -> bool:
    """The first host's answer, on all of them."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.broadcast_one_to_all(np.array(here)))


def log_line(line: str) -> None:
    """Prints on the first host, and logs on all."""
    logging.info("%s", line)
    if jax.process_index() == 0:
        print(line, flush=True)
