"""python -m clip_jax.eval --model=SOURCE --dataset=NAME[,NAME] [--task=TASK[,TASK]] [--out=DIR]."""

import sys

from absl import app, flags, logging
from ml_collections import ConfigDict

from clip_jax.errors import ConfigError, UserError
from clip_jax.eval import TASKS, Encoder, Options, datasets, suites
from clip_jax.eval.logistic import SOLVERS, Solver
from clip_jax.eval.results import Results
from clip_jax.eval.run import Request, log_line, run
from clip_jax.loading import load, load_tokenizer
from clip_jax.sharding import join_hosts, make_mesh, replicate

_MODEL = flags.DEFINE_string("model", None, "Anything that clip_jax.load takes.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "The model's SentencePiece file, where it is not beside the weights."
)
_DATASET = flags.DEFINE_list(
    "dataset", [], f"Folders in --data_dir, paths, or of: {', '.join(datasets())}."
)
_SUITE = flags.DEFINE_list("suite", [], f"Of: {', '.join(suites())}.")
_TASK = flags.DEFINE_list(
    "task", [], f"Of: {', '.join(TASKS)}; default: all the set is for that need no training split."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data sets are; default: TFDS's directory."
)
_OUT = flags.DEFINE_string(
    "out", "results", "Directory for results.json, plots and report.html; local or gs://."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Do also what is done already.")
_CLASSNAMES = flags.DEFINE_string(
    "classnames", None, "A file to use instead of the data set's: a line NAME [| LABEL] a class."
)
_TEMPLATES = flags.DEFINE_string(
    "templates", None, "A file to use instead of the data set's: prompts, {} for the name."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Of all devices together.", lower_bound=1)
_SOLVER = flags.DEFINE_enum(
    "solver", "jax", SOLVERS, "L-BFGS of linear probes: on the devices, or the reference"
)
_SHOTS = flags.DEFINE_list("shots", ["1", "2", "4", "8", "16"], "Examples a class for few_shot.")
_CATEGORIES = flags.DEFINE_string(
    "categories",
    None,
    "For the bias task: a file of categories to associate people with, or `paper`; see "
    "docs/bias.md before you use it.",
)
flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
flags.mark_flags_as_required(["model"])


def _request() -> Request:
    names = list(_DATASET.value)
    for suite in _SUITE.value:
        if suite not in suites():
            raise ConfigError(f"no suite {suite!r}; there are: {', '.join(suites())}")
        names += suites()[suite]
    if not names:
        raise ConfigError("nothing to evaluate: give --dataset or --suite")
    try:
        shots = tuple(int(each) for each in _SHOTS.value)
    except ValueError:
        raise ConfigError(f"--shots={','.join(_SHOTS.value)} should be whole numbers") from None
    solver: Solver = _SOLVER.value  # type: ignore[assignment]
    options = Options(solver=solver, shots=shots, categories=_CATEGORIES.value)
    return Request(
        datasets=tuple(dict.fromkeys(names)),
        tasks=tuple(_TASK.value),
        data_dir=_DATA_DIR.value,
        classnames=_CLASSNAMES.value,
        templates=_TEMPLATES.value,
        tolerant=bool(_SUITE.value),
        overwrite=_OVERWRITE.value,
        options=options,
    )


def main(_: list[str]) -> None:
    """Evaluates, writes and prints."""
    try:
        request = _request()
        join_hosts()
        mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
        source = str(_MODEL.value)
        model, preprocess = load(source)
        tokenizer = load_tokenizer(source, file=_TOKENIZER.value)
        encoder = Encoder(replicate(model, mesh), preprocess, mesh, _BATCH_SIZE.value, tokenizer)
        run(request, encoder, Results(_OUT.value, source), log_line)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
