"""Evaluation: data sets, tasks and what comes out of them.

Command line: `python -m clip_jax.eval --model=WORKDIR --dataset=glyphs`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.config import default_config
from clip_jax.data.sources import open_source
from clip_jax.errors import DataError
from clip_jax.eval.datasets import DATASETS, eval_dataset
from clip_jax.eval.embed import embed_dataset
from clip_jax.eval.tasks import TASKS
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess

__all__ = ["DATASETS", "TASKS", "evaluate", "evaluators"]


def evaluate(
    model: CLIP,
    preprocess: Preprocess,
    mesh: Mesh,
    *,
    dataset: str,
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Embeds a data set once, and asks it for every task.

    Args:
        model: on the mesh, or on the default device.
        preprocess: that of the model.
        mesh: whose devices share out the work.
        dataset: a name in `DATASETS`.
        tasks: names in `TASKS`; none: all that the data set is for.
        data_dir: of TFDS; None: its own default.
        batch_size: of all devices together.

    Returns:
        Metrics by task, with CLIP_benchmark's names.

    Raises:
        DataError: no such data set or task, or data that is missing or damaged.
    """
    entry = eval_dataset(dataset)
    tasks = tasks or entry.tasks
    for task in tasks:
        if task not in entry.tasks:
            raise DataError(f"{dataset} has no task {task!r}; it has: {', '.join(entry.tasks)}")
    data = default_config().data
    data.data_dir = data_dir
    source = open_source(entry.source, data)
    embedded = embed_dataset(model, preprocess, source, mesh, batch_size)
    return {task: TASKS[task](model, entry, source, embedded, mesh, batch_size) for task in tasks}


def evaluators(config: ConfigDict) -> Mapping[str, Callable[..., dict[str, float]]]:
    """What the training loop is handed: an evaluator for each of `config.eval.datasets`.

    Raises:
        DataError: a name that is no evaluation set.
    """

    def run(name: str, model: CLIP, preprocess: Preprocess, mesh: Mesh) -> dict[str, float]:
        by_task = evaluate(
            model,
            preprocess,
            mesh,
            dataset=name,
            data_dir=config.data.data_dir,
            batch_size=config.eval.batch_size,
        )
        return {key: value for metrics in by_task.values() for key, value in metrics.items()}

    for name in config.eval.datasets:
        eval_dataset(name)
    return {name: functools.partial(run, name) for name in config.eval.datasets}
