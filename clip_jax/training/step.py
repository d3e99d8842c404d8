"""The train step: one pure function of (state, batch), jitted over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from clip_jax.data.batch import Batch
from clip_jax.rounding import apply_updates
from clip_jax.training.gradients import Gradients
from clip_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    gradients: Gradients,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    target: TrainState,
    *,
    max_logit_scale: float = 100.0,
    ema_decay: float = 0.0,
    seed: int = 0,
) -> TrainStep:
    """Builds the jitted step; it donates the state it is given.

    Args:
        gradients: of the loss, as `gradients.make_gradients` builds it.
        optimizer: whose state the train state holds.
        schedule: the optimizer's learning rate, for the log.
        target: where the state lies (`state.abstract_state`); it leaves the step as it came.
        max_logit_scale: the paper's cap, 100.
        ema_decay: of the averaged weights, where the state has any.
        seed: of what is random in the step (patch dropout, stochastic rounding).
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        image_key, rounding_key = jax.random.split(key)
        loss, by_param, batch_stats = gradients(
            state.params, state.batch_stats, batch, image_keys(image_key, len(batch.tokens))
        )
        updates, opt_state = optimizer.update(by_param, state.opt_state, state.params)
        params = apply_updates(state.params, updates, rounding_key)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], jnp.log(max_logit_scale))
        metrics = {
            "loss": loss,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "gradient_norm": optax.tree.norm(by_param),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        ema = averaged(state.ema, params, state.step, ema_decay)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics

    shardings = jax.tree.map(lambda shape: shape.sharding, target)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def image_keys(key: Array, batch_size: int) -> Array:
    """A random key for each image, [B], by its position in the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


def averaged(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """Moves the averaged weights, float32, towards the weights; an empty tree stays empty.

    In the first steps the average is short, (1 + step) / (10 + step), so that the initial weights
    are soon forgotten.
    """
    if not ema:
        return ema
    moves = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + moves * (new - old), ema, params)
