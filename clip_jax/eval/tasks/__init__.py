"""The tasks: a data set and a model -> metrics. One file a task."""

from collections.abc import Mapping

from clip_jax.eval.outcome import Task
from clip_jax.eval.tasks.bias import bias
from clip_jax.eval.tasks.compositional import compositional
from clip_jax.eval.tasks.few_shot import few_shot
from clip_jax.eval.tasks.linear_probe import linear_probe
from clip_jax.eval.tasks.retrieval import retrieval
from clip_jax.eval.tasks.zero_shot import zero_shot

TASKS: Mapping[str, Task] = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "compositional": compositional,
    "bias": bias,
    "linear_probe": linear_probe,
    "few_shot": few_shot,
}
NEED_TRAIN = frozenset(["linear_probe", "few_shot"])  # a training split
NEED_FEATURES = NEED_TRAIN | {"bias"}  # of the penultimate layer
NEED_TEXT = frozenset(TASKS) - {"linear_probe"}  # a text tower
