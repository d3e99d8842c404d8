"""The train state, and how it starts."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.loading import read_weights
from clip_jax.models import CLIP, CLIPConfig, resize_positions
from clip_jax.models.resnet import BatchNorm
from clip_jax.models.transformer import Remat
from clip_jax.optim import matching_mask
from clip_jax.sharding import state_shardings
from clip_jax.weights.source import flatten, nest


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: (
        Any  # nested dicts of float32 arrays; of bfloat16 where `optim.bfloat16_weights` says so
    )
    batch_stats: Any  # likewise, of the same paths: BatchNorm's running statistics; {} without any
    opt_state: Any  # optax's
    ema: Any  # the averaged weights, float32; {} where `optim.ema_decay` is 0

    @property
    def best_params(self) -> Any:
        """What to evaluate and to hand on: the averaged weights where there are any."""
        return self.ema or self.params


class AbstractModel(NamedTuple):
    """A `CLIP` without arrays: its graph definition, and the shapes of what it holds."""

    graphdef: nnx.GraphDef
    params: Any
    batch_stats: Any

    def merge(self, params: Any, batch_stats: Any) -> CLIP:
        """The model with these arrays."""
        return nnx.merge(self.graphdef, params, batch_stats)


def abstract_model(
    config: CLIPConfig,
    dtype: str = "float32",
    remat: Remat = "none",
    unroll: int = 1,
    frozen: Sequence[str] = (),
    bfloat16_weights: Sequence[str] = (),
) -> AbstractModel:
    """The model without arrays.

    Args:
        config: the architecture.
        dtype: of compute.
        remat: see `models.transformer.Transformer`.
        unroll: likewise.
        frozen: patterns as in `optim.matching_mask`; BatchNorm whose running statistics they freeze
            uses them in training, too.
        bfloat16_weights: patterns of the parameters that are stored in bfloat16.

    Raises:
        ConfigError: a pattern that is found in no path.
    """
    model = nnx.eval_shape(
        lambda: CLIP(config, dtype=jnp.dtype(dtype), remat=remat, unroll=unroll, rngs=nnx.Rngs(0))
    )
    params, batch_stats = _variables(model)
    for key, patterns in (("frozen", frozen), ("bfloat16_weights", bfloat16_weights)):
        for pattern in patterns:
            found = [matching_mask(tree, [pattern]) for tree in (params, batch_stats)]
            if not any(jax.tree.leaves(found)):
                raise ConfigError(
                    f"optim.{key}: {pattern!r} is found in no parameter's path; paths are such as "
                    "visual/transformer/blocks/mlp/up/kernel, text/token_embedding, logit_scale"
                )
    params = jax.tree.map(
        lambda shape, half: jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16) if half else shape,
        params,
        matching_mask(params, bfloat16_weights),
    )
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            name = "/".join(map(str, (*path, "mean")))
            module.use_running_average = any(re.search(pattern, name) for pattern in frozen)
    return AbstractModel(nnx.graphdef(model), params, batch_stats)


def _variables(model: CLIP) -> tuple[Any, Any]:
    """Parameters and running statistics as plain nested dicts."""
    params, batch_stats = (nnx.state(model, kind) for kind in (nnx.Param, nnx.BatchStat))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def abstract_state(
    model: AbstractModel, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the train state of a model, with averaged weights or not."""
    shapes = jax.eval_shape(
        lambda params, stats: _fresh(params, stats, optimizer, ema), model.params, model.batch_stats
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def initial_state(
    config: CLIPConfig, optimizer: optax.GradientTransformation, target: TrainState, seed: int
) -> TrainState:
    """A fresh state as `target` describes it, every array made where it will lie."""

    def create(key: Array) -> TrainState:
        params, batch_stats = _variables(CLIP(config, rngs=nnx.Rngs(key)))
        params = jax.tree.map(lambda x, stored: x.astype(stored.dtype), params, target.params)
        return _fresh(params, batch_stats, optimizer, bool(target.ema))

    shardings = jax.tree.map(lambda shape: shape.sharding, target)
    return jax.jit(create, out_shardings=shardings)(jax.random.key(seed))


def with_weights_of(source: str, state: TrainState, config: CLIPConfig) -> TrainState:
    """A fresh state whose weights are those of a trained model.

    Args:
        source: anything that `clip_jax.load` takes.
        state: fresh.
        config: its architecture; only the resolution and the patch dropout may be others than the
            source's. Image positions are resized.

    Raises:
        CheckpointError: weights of another architecture, or of another tokenizer.
        WeightsError: as `load`.
    """
    weights = read_weights(source)
    if weights.tokenizer.kind != "clip":
        raise CheckpointError(
            f"train.init_from={source} reads the tokens of a SentencePiece model, and training "
            "makes those of CLIP's tokenizer"
        )
    theirs, ours = flatten(weights.config.to_dict()), flatten(config.to_dict())
    differences = [
        f"model.{key.replace('/', '.')}: {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
        and key not in ("vision/image_size", "vision/patch_dropout")
    ]
    if differences:
        raise CheckpointError(
            f"the weights of train.init_from={source} do not fit this config's model:\n  "
            + "\n  ".join(differences)
        )
    logging.info("starting from the weights of %s", source)
    arrays = flatten(resize_positions(nest(weights.arrays), weights.config.vision, config.vision))

    def taken(tree: Any) -> Any:
        placed = {
            path: jax.device_put(arrays[path].astype(old.dtype), old.sharding)
            for path, old in flatten(tree).items()
        }
        return nest(placed)

    params, batch_stats, ema = map(taken, (state.params, state.batch_stats, state.ema))
    return state._replace(params=params, batch_stats=batch_stats, ema=ema)


def _fresh(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, ema: bool
) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        batch_stats,
        optimizer.init(params),
        jax.tree.map(lambda x: x.astype(jnp.float32), params) if ema else {},
    )
