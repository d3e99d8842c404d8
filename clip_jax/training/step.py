"""The train step: one pure function of (state, batch), jitted over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.data.batch import Batch
from clip_jax.losses import softmax_loss
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import BATCH_AXES, BATCH_SPEC
from clip_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    preprocess: Preprocess,
    max_logit_scale: float,
    target: TrainState,
    mesh: Mesh,
) -> TrainStep:
    """Builds the jitted step; it donates the state it is given.

    Args:
        graphdef: of a `CLIP`, as `state.abstract_model` gives it.
        optimizer: whose state the train state holds.
        schedule: the optimizer's learning rate, for the log.
        preprocess: normalises the batch's uint8 pixels.
        max_logit_scale: the paper's cap, 100.
        target: where the state lies (`state.abstract_state`); it leaves the step as it came.
        mesh: the axes `BATCH_AXES` split the batch.
    """
    global_loss = jax.shard_map(
        lambda image, text, scale: softmax_loss(image, text, scale, axis_names=BATCH_AXES),
        mesh=mesh,
        in_specs=(BATCH_SPEC, BATCH_SPEC, PartitionSpec()),
        out_specs=PartitionSpec(),
    )

    def loss_of(params: Any, batch: Batch) -> Float[Array, ""]:
        model: CLIP = nnx.merge(graphdef, params)
        image = model.encode_image(preprocess.normalize(batch.image), normalize=True)
        text = model.encode_text(batch.tokens, normalize=True)
        return global_loss(image, text, jnp.exp(model.logit_scale[...]))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], jnp.log(max_logit_scale))
        metrics = {
            "loss": loss,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda shape: shape.sharding, target)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
