"""Evaluation: data sets, tasks and what comes out of them.

Command line: `python -m clip_jax.eval --model=SOURCE --dataset=cifar10 --data_dir=DIR`. In Python:

>>> model, preprocess = clip_jax.load("runs/quickstart")
>>> clip_jax.eval.zero_shot(model, "cifar10", preprocess=preprocess, data_dir="data").metrics
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.errors import ConfigError, DataError
from clip_jax.eval.embed import Encoder
from clip_jax.eval.opening import find
from clip_jax.eval.outcome import Data, Options, Outcome
from clip_jax.eval.registry import datasets, suites
from clip_jax.eval.tasks import NEED_FEATURES, NEED_TEXT, TASKS
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import make_mesh, replicate

__all__ = [
    "TASKS",
    "Encoder",
    "Options",
    "Outcome",
    "datasets",
    "evaluate",
    "evaluators",
    "few_shot",
    "linear_probe",
    "retrieval",
    "suites",
    "zero_shot",
]


def evaluate(
    encoder: Encoder,
    dataset: str,
    *,
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    classnames: str | None = None,
    templates: str | None = None,
    options: Options = Options(),  # noqa: B008  (frozen)
) -> dict[str, Outcome]:
    """Embeds a data set once, and asks it for every task; all hosts must call it.

    Args:
        encoder: the model on its mesh.
        dataset: a name of `datasets()`, of a folder in `data_dir`, or a path.
        tasks: names in `TASKS`; none: all that the data set is for.
        data_dir: where data sets are; None: TFDS's default directory.
        classnames: a file of class names to use instead of those of the data set.
        templates: likewise, of templates.
        options: see there.

    Returns:
        The outcomes by task.

    Raises:
        DataError: no such data set or task, or data that is missing or damaged.
        ConfigError: a model that cannot do a task.
    """
    for task in tasks:
        if task not in TASKS:
            raise DataError(f"no task {task!r}; there are: {', '.join(TASKS)}")
    found = find(dataset, data_dir, classnames, templates)
    tasks = tasks or found[0].entry.tasks
    needs_text = NEED_TEXT.intersection(tasks)
    if needs_text and getattr(encoder.model, "text", None) is None:
        raise ConfigError(
            f"the model has no text tower, which {', '.join(sorted(needs_text))} needs; "
            "--task=linear_probe does without"
        )
    features = bool(NEED_FEATURES.intersection(tasks))
    outcomes: dict[str, list[Outcome]] = {task: [] for task in tasks}
    for one in found:
        data = Data(one, encoder, features)
        for task in tasks:
            outcomes[task].append(TASKS[task](data, options))
    return {task: _mean(of_task) for task, of_task in outcomes.items()}


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Of several splits, the mean of the metrics and of the ends of their intervals."""
    if len(outcomes) == 1:
        return outcomes[0]
    first = outcomes[0]

    def mean(values: Sequence[Any]) -> Any:
        return np.mean(values, axis=0).tolist()

    return Outcome(
        {name: mean([o.metrics[name] for o in outcomes]) for name in first.metrics},
        {k: tuple(mean([o.intervals[k] for o in outcomes])) for k in first.intervals},
        sum(o.examples for o in outcomes),
        sum(o.unreadable for o in outcomes),
        (*first.notes, f"mean of {len(outcomes)} splits"),
        first.predictions,
        first.details,
    )


def _asked(task: str) -> Callable[..., Outcome]:
    def ask(
        model: CLIP,
        dataset: str,
        *,
        preprocess: Preprocess | None = None,
        mesh: Mesh | None = None,
        batch_size: int = 256,
        **keywords: Any,
    ) -> Outcome:
        if mesh is None:
            mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
            model = replicate(model, mesh)
        preprocess = preprocess or Preprocess(model.config.vision.image_size)
        encoder = Encoder(model, preprocess, mesh, batch_size)
        return evaluate(encoder, dataset, tasks=[task], **keywords)[task]

    ask.__name__ = ask.__qualname__ = task
    ask.__doc__ = f"""{(TASKS[task].__doc__ or "").splitlines()[0]}

    Args:
        model: what `clip_jax.load` gives.
        dataset: a name of `datasets()`, of a folder in `data_dir`, or a path.
        preprocess: that of the model; None: OpenAI's, at the model's resolution.
        mesh: that the model lies on; None: all devices.
        batch_size: of all devices together.
        keywords: `data_dir`, `classnames`, `templates` and `options` of `evaluate`.
    """
    return ask


zero_shot = _asked("zero_shot")
retrieval = _asked("retrieval")
linear_probe = _asked("linear_probe")
few_shot = _asked("few_shot")


def evaluators(config: ConfigDict) -> Mapping[str, Callable[..., dict[str, float]]]:
    """What the training loop is handed: an evaluator for each of `config.eval.datasets`.

    Raises:
        DataError: a name that is no evaluation set.
    """

    def run(name: str, model: CLIP, preprocess: Preprocess, mesh: Mesh) -> dict[str, float]:
        encoder = Encoder(model, preprocess, mesh, config.eval.batch_size)
        by_task = evaluate(
            encoder,
            name,
            data_dir=config.data.data_dir,
            options=Options(intervals=False),
        )
        return {key: value for each in by_task.values() for key, value in each.metrics.items()}

    for name in config.eval.datasets:
        find(name, config.data.data_dir)
    return {name: functools.partial(run, name) for name in config.eval.datasets}
