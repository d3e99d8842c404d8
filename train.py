"""Trains a CLIP: python train.py --config=configs/quickstart.py [--workdir=DIR]."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from clip_jax.config import parse_flags
from clip_jax.errors import UserError
from clip_jax.eval import evaluators
from clip_jax.eval.report import write_report
from clip_jax.sharding import join_hosts
from clip_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, such as configs/quickstart.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "For checkpoints, logs and plots, local or gs://; default: runs/RECIPE."
)

# --verbosity=0: what the libraries say, too
flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]


def main(_: list[str]) -> None:
    """Trains, evaluates, and leaves a report in the workdir."""
    config = _CONFIG.value
    recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{recipe}"
    try:
        join_hosts()
        result = train(config, workdir, evaluators(config))
        write_report(result, config, workdir)
    except (UserError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
