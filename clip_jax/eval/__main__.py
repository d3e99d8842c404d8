"""python -m clip_jax.eval --model=WORKDIR --dataset=glyphs [--task=zero_shot] [--out=FILE]."""

import json
import sys
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from clip_jax.errors import UserError
from clip_jax.eval import DATASETS, TASKS, evaluate
from clip_jax.eval.report import table
from clip_jax.loading import load
from clip_jax.sharding import join_hosts, make_mesh, replicate

_MODEL = flags.DEFINE_string("model", None, "A workdir or a checkpoint; local or gs://.")
_DATASET = flags.DEFINE_list("dataset", None, f"Of: {', '.join(DATASETS)}.")
_TASK = flags.DEFINE_list("task", [], f"Of: {', '.join(TASKS)}; default: all the data set is for.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Of TFDS; default: TFDS's own.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Of all devices together.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", None, "Results, one JSON object a line; default: standard output."
)
flags.FLAGS.verbosity = logging.WARNING
flags.mark_flags_as_required(["model", "dataset"])


def _rows() -> list[dict[str, Any]]:
    """Results in CLIP_benchmark's schema, one for each data set and task."""
    join_hosts()
    mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    model, preprocess = load(_MODEL.value)
    model = replicate(model, mesh)
    rows: list[dict[str, Any]] = []
    for dataset in _DATASET.value or ():
        by_task = evaluate(
            model,
            preprocess,
            mesh,
            dataset=dataset,
            tasks=_TASK.value,
            data_dir=_DATA_DIR.value,
            batch_size=_BATCH_SIZE.value,
        )
        rows += [
            {
                "dataset": dataset,
                "model": "clip_jax",
                "pretrained": _MODEL.value,
                "task": task,
                "metrics": metrics,
                "language": "en",
            }
            for task, metrics in by_task.items()
        ]
    return rows


def main(_: list[str]) -> None:
    """Evaluates and prints."""
    try:
        rows = _rows()
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if jax.process_index() != 0:
        return
    for row in rows:
        print(f"\n{row['dataset']}, {row['task']}\n{table(row['metrics'])}")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if _OUT.value:
        epath.Path(_OUT.value).write_text(lines)
    else:
        print(f"\n{lines}", end="")


if __name__ == "__main__":
    app.run(main)
