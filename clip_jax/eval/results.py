"""Results on disk: what `--out=DIR` holds, and what of it need not be done again.

    results.json              all rows, one JSON object a line, in CLIP_benchmark's schema
    rows/KEY.json             the same rows, a file each; `clip_benchmark build DIR/rows` reads them
    details/KEY.json          intervals, the paper's figures, notes, the settings
    plots/KEY--*.png          figures
    report.html               all of it, in one file

KEY is the data set, the task and the model. A row is written when it is complete, under its final
name only then, so that an interrupted run goes on with what is missing.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from clip_jax.eval.outcome import Outcome
from clip_jax.eval.registry import EvalDataset
from clip_jax.eval.tasks import TASKS
from clip_jax.models import CLIP, CLIPConfig, available_models, model_config

Row = dict[str, Any]
# CLIP_benchmark's names of the tasks that it has, too.
_TASK_NAMES = {
    "zero_shot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "compositional": "image_caption_selection",
}


class Results:
    """The directory of results.

    Args:
        directory: local or gs://; made where it is not there.
        source: of the model, as the user gave it.
    """

    def __init__(self, directory: epath.PathLike, source: str):
        self.directory = epath.Path(directory).expanduser()
        self._tag = _tag(source)
        self._source = source

    def key(self, dataset: str, task: str) -> str:
        """Of files, and of an entry of the report."""
        return f"{dataset}--{task}--{self._tag}"

    def finished(self, dataset: str, task: str, settings: Mapping[str, Any]) -> bool:
        """Whether this result is there, of the same weights and settings."""
        key = self.key(dataset, task)
        details = self._path("details", key)
        if not (details.exists() and self._path("rows", key).exists()):
            return False
        return json.loads(details.read_text())["settings"] == json.loads(json.dumps(settings))

    def write(
        self, key: str, row: Row, details: Mapping[str, Any], figures: Mapping[str, Any]
    ) -> None:
        """Writes one result; the row comes last."""
        for name, figure in figures.items():
            self.draw(f"{key}--{name}", figure)
        _write(self._path("details", key), json.dumps(details, indent=1) + "\n")
        _write(self._path("rows", key), json.dumps(row) + "\n")

    def draw(self, name: str, figure: Any) -> None:
        """Writes a figure as PNG."""
        directory = self.directory / "plots"
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{name}.png").open("wb") as file:
            figure.savefig(file, format="png", dpi=110)

    def read(self) -> Iterator[tuple[str, Row, dict[str, Any]]]:
        """Key, row and details of all results of all models, by model, data set and task."""
        rows = self.directory / "rows"
        paths = rows.glob("*.json") if rows.exists() else ()
        order = [_TASK_NAMES.get(task, task) for task in TASKS]

        def place(row: Row) -> tuple:
            return row["pretrained"], row["dataset"], order.index(row["task"])

        found = [(path.name, json.loads(path.read_text())) for path in paths]
        for name, row in sorted(found, key=lambda each: place(each[1])):
            details = json.loads((self.directory / "details" / name).read_text())
            yield name.removesuffix(".json"), row, details

    def collect(self) -> None:
        """Writes results.json anew from all rows."""
        lines = "".join(json.dumps(row) + "\n" for _, row, _ in self.read())
        _write(self.directory / "results.json", lines)

    def row(self, dataset: str, task: str, model: CLIP, outcome: Outcome) -> Row:
        """A result in CLIP_benchmark's schema."""
        return {
            "dataset": dataset,
            "model": architecture_name(model.config) or "clip_jax",
            "pretrained": self._source,
            "task": _TASK_NAMES.get(task, task),
            "metrics": outcome.metrics,
            "language": "en",
        }

    def _path(self, kind: str, key: str) -> epath.Path:
        return self.directory / kind / f"{key}.json"


def paper_figures(entry: EvalDataset, task: str, config: CLIPConfig) -> dict[str, float]:
    """The paper's figures, shares of one, by metric: those of the model's architecture."""
    name = architecture_name(config)
    found = entry.figures.get(task, {}).get(name) if name else None
    if found is None:
        return {}
    if isinstance(found, Mapping):
        return {metric: value / 100 for metric, value in found.items()}
    prefix = "lp_" if task == "linear_probe" else ""
    return {f"{prefix}{entry.metric}": found / 100}


def architecture_name(config: CLIPConfig) -> str | None:
    """The name of the released model that has these sizes, activation aside; None: no such one."""

    def sizes(config: Any) -> Any:
        values = config.to_dict()
        for tower in (values["vision"], values["text"]):
            tower.pop("activation", None)
        return values

    own = sizes(config)
    return next((name for name in available_models() if sizes(model_config(name)) == own), None)


def fingerprint(model: CLIP) -> str:
    """Tells weights apart: a workdir that trained on holds others than before."""

    @jax.jit
    def sums(state):
        return jax.tree.map(lambda leaf: jnp.sum(jnp.abs(leaf.astype(jnp.float32))), state)

    found = jax.tree.leaves(jax.device_get(sums(nnx.to_pure_dict(nnx.state(model)))))
    text = " ".join(f"{float(value):.5g}" for value in found)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tag(source: str) -> str:
    """The end of a path, fit for file names, and a hash of all of it."""
    name = re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2]).strip("-") or "model"
    return f"{name[:40]}-{hashlib.sha256(source.encode()).hexdigest()[:6]}"


def _write(path: epath.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)
