"""What the commands over a source have in common: their arguments, and how they end."""

import argparse
import sys
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from clip_jax.config import default_config
from clip_jax.errors import UserError


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Of a command that takes SOURCE, and what says how to read it."""
    made = argparse.ArgumentParser(
        f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("source", metavar="SOURCE", help="one spec of config.data.train")
    made.add_argument("--data_dir", help="of TFDS; default: TFDS's own")
    made.add_argument("--image_field", help="as config.data.image_field")
    made.add_argument("--captions", help="as config.data.captions, separated by commas")
    return made


def data_config(arguments: argparse.Namespace) -> ConfigDict:
    """The `data` section that the arguments stand for."""
    config = default_config().data
    captions = arguments.captions and tuple(arguments.captions.split(","))
    config.update(data_dir=arguments.data_dir, image_field=arguments.image_field, captions=captions)
    return config


def run(command: Callable[[Sequence[str] | None], None]) -> None:
    """Ends the process with a message where the user can put it right, or has stopped it."""
    try:
        command(None)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
