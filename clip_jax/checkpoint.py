"""Checkpoints by Orbax: asynchronous, atomic, and self-describing.

WORKDIR/checkpoints/STEP/    params       the weights alone, so that a reader needs no optimizer
                             batch_stats  BatchNorm's running statistics, where the model has any
                             ema          the averaged weights, where the run averages them
                             optimizer    the rest of the train state, the step included
                             metadata     the model card and the data order, as JSON
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from clip_jax.errors import CheckpointError
from clip_jax.models import CLIPConfig
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizers import CLIP_BPE, TokenizerSpec
from clip_jax.version import __version__

T = TypeVar("T")

FORMAT = 1
_DIRECTORY = "checkpoints"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What one must know to use the weights, beside the weights."""

    model: CLIPConfig
    preprocess: Preprocess
    config: dict[str, Any]
    tokenizer: TokenizerSpec = CLIP_BPE

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the versions that wrote it."""
        packages = ("jax", "flax", "optax", "orbax-checkpoint")
        return {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "preprocess": self.preprocess.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "config": self.config,
            "versions": {"clip_jax": __version__}
            | {package: importlib.metadata.version(package) for package in packages},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelCard":
        """The inverse of `to_dict`."""
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {values['format']}, this version reads {FORMAT}"
            )
        return cls(
            model=CLIPConfig.from_dict(values["model"]),
            preprocess=Preprocess.from_dict(values["preprocess"]),
            config=values["config"],
            tokenizer=TokenizerSpec.from_dict(values["tokenizer"]),
        )


class Checkpoints:
    """The checkpoints of one run.

    Args:
        workdir: local or gs://.
        keep: how many of the newest to keep.
    """

    def __init__(self, workdir: epath.PathLike, keep: int):
        self.directory = _absolute(workdir) / _DIRECTORY
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def save(self, state: Any, card: ModelCard, order: dict[str, Any]) -> None:
        """Starts to write; returns once the arrays are copied. Waits for the save before it.

        Args:
            state: a train state: a NamedTuple with `step`, `params`, `batch_stats` and `ema`.
            card: of the model.
            order: where the data stands.
        """
        self._checkpointer.save_checkpointables_async(
            int(state.step),
            _parts(state),
            force=True,
            custom_metadata={"card": card.to_dict(), "order": order},
        )

    def restore(self, target: Any, card: ModelCard) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        Newer ones that cannot be read are reported and moved to `checkpoints.unreadable/`.

        Args:
            target: the train state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct`).
            card: of the run that asks; a checkpoint of another architecture is refused.

        Returns:
            The state, and the order of the data at that point.

        Raises:
            CheckpointError: the checkpoints belong to another model, or none can be read.
        """
        unreadable: dict[epath.Path, str] = {}
        for step in sorted((c.step for c in self._checkpointer.checkpoints), reverse=True):
            path = self.directory / str(step)
            try:
                metadata = _read_metadata(path)
                _check_same_model(ModelCard.from_dict(metadata["card"]), card, path)
                arrays = ocp.load_checkpointables(path, _parts(target))
            except CheckpointError:
                raise
            except Exception as error:  # whatever Orbax meets in a damaged directory
                unreadable[path] = _first_line(error)
                logging.error("checkpoint %s cannot be read (%s)", path, unreadable[path])
                continue
            for damaged in unreadable:
                self._set_aside(damaged)
            optimizer = arrays.pop("optimizer")
            return target._replace(**arrays, **optimizer), metadata["order"]
        if unreadable:
            raise CheckpointError(
                "no checkpoint can be read; restore them from a copy, or train into another "
                "--workdir:\n  " + "\n  ".join(f"{p}: {why}" for p, why in unreadable.items())
            )
        return None

    def _set_aside(self, path: epath.Path) -> None:
        """Makes room for the step to be saved again, without deleting anything."""
        aside = path.parent.parent / f"{_DIRECTORY}.unreadable" / path.name
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        self._checkpointer.reload()
        logging.error("falling back to an older checkpoint; moved %s to %s", path, aside)

    def close(self) -> None:
        """Waits until everything is written."""
        self._checkpointer.close()


def save_weights(workdir: epath.PathLike, card: ModelCard, params: Any, batch_stats: Any) -> None:
    """Writes weights alone, as step 0 of a workdir: what `load_params` reads.

    Args:
        workdir: local or gs://; without checkpoints.
        card: of the model.
        params: nested dicts of arrays.
        batch_stats: likewise; {} where the model has none.

    Raises:
        CheckpointError: there are checkpoints already.
    """
    directory = _absolute(workdir) / _DIRECTORY
    if directory.exists():
        raise CheckpointError(f"{directory} is there already; choose another folder")
    parts = {"params": params, "batch_stats": batch_stats}
    ocp.save_checkpointables(
        directory / "0",
        {name: part for name, part in parts.items() if part},
        custom_metadata={"card": card.to_dict()},
    )


def holds_checkpoint(path: epath.PathLike) -> bool:
    """Whether `load_params` would find something to read there."""
    return next(_candidates(_absolute(path)), None) is not None


def load_card(path: epath.PathLike) -> ModelCard:
    """The card of the newest readable checkpoint; arguments and errors as `load_params`."""
    return _newest(path, lambda candidate: ModelCard.from_dict(_read_metadata(candidate)["card"]))


def load_params(path: epath.PathLike) -> tuple[ModelCard, Any, Any]:
    """The weights of the newest readable checkpoint, on the default device.

    Where the run averages its weights, these are the averages.

    Args:
        path: a workdir, its `checkpoints` directory, or one checkpoint in it.

    Returns:
        The model card, and the parameters and BatchNorm's running statistics ({} where the model
        has none), both as nested dicts of float32 arrays.

    Raises:
        CheckpointError: no checkpoint there, or none that can be read.
    """

    def read(candidate: epath.Path) -> tuple[ModelCard, Any, Any]:
        card = ModelCard.from_dict(_read_metadata(candidate)["card"])
        held = ocp.checkpointables_metadata(candidate).metadata
        weights = "ema" if "ema" in held else "params"
        wanted = {name: held[name] for name in (weights, "batch_stats") if name in held}
        arrays = ocp.load_checkpointables(candidate, jax.tree.map(_on_default_device, wanted))
        return card, arrays[weights], arrays.get("batch_stats", {})

    return _newest(path, read)


def _newest(path: epath.PathLike, read: Callable[[epath.Path], T]) -> T:
    """What `read` gives for the newest checkpoint that it can read."""
    failures = []
    for candidate in _candidates(_absolute(path)):
        try:
            return read(candidate)
        except Exception as error:  # whatever Orbax meets in a damaged directory
            logging.error("checkpoint %s cannot be read (%s)", candidate, _first_line(error))
            failures.append(f"{candidate}: {_first_line(error)}")
    if failures:
        raise CheckpointError("no checkpoint can be read:\n  " + "\n  ".join(failures))
    raise CheckpointError(
        f"no checkpoint in {path}: expected a workdir that train.py has written, "
        f"its {_DIRECTORY}/ or one step in there"
    )


def _on_default_device(leaf: Any) -> jax.ShapeDtypeStruct:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=device)


def _parts(state: Any) -> dict[str, Any]:
    """The train state as it is stored; Orbax stores no empty tree."""
    optimizer = state._asdict()
    parts = {name: optimizer.pop(name) for name in ("params", "batch_stats", "ema")}
    return {name: part for name, part in parts.items() if part} | {"optimizer": optimizer}


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax writes to no other; a bucket's address is one already."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


def _candidates(path: epath.Path) -> Iterator[epath.Path]:
    """The checkpoint that `path` is, or those below it, newest first."""
    if (path / _DIRECTORY).is_dir():
        path = path / _DIRECTORY
    if (path / "params").is_dir():
        yield path
    elif path.is_dir():
        steps = [child for child in path.iterdir() if child.name.isdigit()]
        yield from sorted(steps, key=lambda child: int(child.name), reverse=True)


def _read_metadata(path: epath.Path) -> dict[str, Any]:
    metadata = ocp.checkpointables_metadata(path).custom_metadata
    if not metadata or "card" not in metadata:
        raise CheckpointError(f"{path} carries no model card; it is not a checkpoint of clip_jax")
    return dict(metadata)


def _check_same_model(found: ModelCard, expected: ModelCard, path: epath.Path) -> None:
    found_model, expected_model = found.model.to_dict(), expected.model.to_dict()

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        leaves = jax.tree_util.tree_flatten_with_path(values)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}

    found_flat, expected_flat = flat(found_model), flat(expected_model)
    differences = [
        f"model.{key}: {found_flat.get(key)} there, {expected_flat.get(key)} in this config"
        for key in sorted(found_flat | expected_flat)
        if found_flat.get(key) != expected_flat.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{path} holds another model; choose another --workdir or the config that made it:\n  "
            + "\n  ".join(differences)
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
