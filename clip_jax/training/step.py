"""The train step: one pure function of (state, batch), jitted over the mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.data.batch import Batch
from clip_jax.losses import softmax_loss
from clip_jax.models import Training
from clip_jax.optim import frozen_mask
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import BATCH_AXES, BATCH_SPEC
from clip_jax.training.state import AbstractModel, TrainState

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Encoded(NamedTuple):
    """What the loss is a function of."""

    image: Float[Array, "B E"]  # unit length
    text: Float[Array, "B E"]
    logit_scale: Float[Array, ""]


def make_encode(
    model: AbstractModel, preprocess: Preprocess, frozen: Sequence[str] = ()
) -> Callable[..., tuple[Encoded, Any]]:
    """The forward pass in training as a pure function.

    Args:
        model: as `state.abstract_model` gives it.
        preprocess: normalises the batch's uint8 pixels.
        frozen: patterns of parameter paths that get no gradient.

    Returns:
        (params, batch_stats, batch, `Training`) -> (`Encoded`, batch_stats).
    """

    def encode(
        params: Any, batch_stats: Any, batch: Batch, training: Training
    ) -> tuple[Encoded, Any]:
        params = jax.tree.map(
            lambda array, stays: jax.lax.stop_gradient(array) if stays else array,
            params,
            frozen_mask(params, frozen),
        )
        clip = model.merge(params, batch_stats)
        encoded = Encoded(
            clip.encode_image(preprocess.normalize(batch.image), normalize=True, training=training),
            clip.encode_text(batch.tokens, normalize=True),
            jnp.exp(clip.logit_scale[...]),
        )
        return encoded, nnx.to_pure_dict(nnx.state(clip, nnx.BatchStat))

    return encode


def image_keys(seed: int, step: Int[Array, ""], batch_size: int) -> Array:
    """A random key for each image of a step, [B]: a pure function of the seed and the position."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


def make_train_step(
    model: AbstractModel,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    preprocess: Preprocess,
    max_logit_scale: float,
    target: TrainState,
    mesh: Mesh,
    *,
    seed: int = 0,
    frozen: Sequence[str] = (),
) -> TrainStep:
    """Builds the jitted step; it donates the state it is given.

    Args:
        model: as `state.abstract_model` gives it.
        optimizer: whose state the train state holds.
        schedule: the optimizer's learning rate, for the log.
        preprocess: normalises the batch's uint8 pixels.
        max_logit_scale: the paper's cap, 100.
        target: where the state lies (`state.abstract_state`); it leaves the step as it came.
        mesh: the axes `BATCH_AXES` split the batch.
        seed: of what is random in the model (patch dropout).
        frozen: patterns of parameter paths that get no gradient, see `optim.frozen_mask`.
    """
    encode = make_encode(model, preprocess, frozen)
    global_loss = jax.shard_map(
        lambda image, text, scale: softmax_loss(image, text, scale, axis_names=BATCH_AXES),
        mesh=mesh,
        in_specs=(BATCH_SPEC, BATCH_SPEC, PartitionSpec()),
        out_specs=PartitionSpec(),
    )

    def loss_of(params: Any, state: TrainState, batch: Batch) -> tuple[Float[Array, ""], Any]:
        training = Training(image_keys(seed, state.step, len(batch.tokens)))
        encoded, batch_stats = encode(params, state.batch_stats, batch, training)
        return global_loss(*encoded), batch_stats

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state, batch
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], jnp.log(max_logit_scale))
        metrics = {
            "loss": loss,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    shardings = jax.tree.map(lambda shape: shape.sharding, target)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
