"""The train state, and how it starts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.layers import Remat
from clip_jax.sharding import state_shardings


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: Any  # nested dicts of float32 arrays
    opt_state: Any  # optax's


def abstract_model(
    config: CLIPConfig, dtype: str = "float32", remat: Remat = "none", unroll: int = 1
) -> tuple[nnx.GraphDef, Any]:
    """The model without arrays: its graph definition, and the shapes of its parameters."""
    model = nnx.eval_shape(
        lambda: CLIP(config, dtype=jnp.dtype(dtype), remat=remat, unroll=unroll, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def abstract_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state, from the shapes of the parameters."""
    shapes = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), params
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def initial_state(
    config: CLIPConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A fresh state, every array made where it will lie."""

    def create(key: Array) -> TrainState:
        model = CLIP(config, rngs=nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    key = jax.random.key(seed)
    shardings = state_shardings(jax.eval_shape(create, key), mesh)
    return jax.jit(create, out_shardings=shardings)(key)
