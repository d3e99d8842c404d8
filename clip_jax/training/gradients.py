"""The gradient of the whole batch's loss, exactly, on any mesh and in any number of microbatches.

Where the mesh splits the batch and nothing else, the towers run under `jax.shard_map`, each device
on its own rows, and gradients are summed once a step, in float32, after the last layer; where it
splits parameters, too, the partitioner places the sums. The loss is a function of embeddings alone,
which makes accumulation exact: embed all microbatches, differentiate the loss of the whole batch by
the embeddings, go back through the last microbatch, and embed the others again to do so.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.data.batch import Batch
from clip_jax.errors import ConfigError
from clip_jax.losses import Communication, sigmoid_loss, softmax_loss
from clip_jax.models import Training
from clip_jax.models.rows import rows_lie
from clip_jax.optim import matching_mask
from clip_jax.preprocess import Preprocess
from clip_jax.resize import crop_resize
from clip_jax.sharding import BATCH_AXES, BATCH_SPEC, batch_divisor
from clip_jax.training.state import AbstractModel

Loss = Literal["softmax", "sigmoid"]
# (params, batch_stats, batch, image_keys) -> (loss, gradients, batch_stats)
Gradients = Callable[[Any, Any, Batch, Array], tuple[Float[Array, ""], Any, Any]]

_SCALARS = ("logit_scale", "logit_bias")  # parameters of the loss, not of a tower


class Embeddings(NamedTuple):
    """Of one batch or microbatch: what the loss is a function of, beside its scalars."""

    image: Float[Array, "*rows E"]  # unit length
    text: Float[Array, "*rows E"]


def make_gradients(
    model: AbstractModel,
    preprocess: Preprocess,
    mesh: Mesh,
    *,
    loss: str = "softmax",
    communication: str = "gather",
    accumulate: int = 1,
    frozen: Sequence[str] = (),
) -> Gradients:
    """Builds (params, batch_stats, batch, image_keys) -> (loss, gradients, batch_stats).

    Gradients are float32, whatever the dtype in which a parameter is stored. Microbatches are made
    of each device's own rows. BatchNorm normalises each microbatch by its own statistics, of all
    devices together, and its running statistics move once a step, towards the mean of those.

    Args:
        model: as `state.abstract_model` gives it.
        preprocess: normalises the batch's uint8 pixels.
        mesh: the axes `BATCH_AXES` split the batch.
        loss: "softmax" or "sigmoid", see `losses`.
        communication: "gather" or "ring", likewise.
        accumulate: the number of microbatches.
        frozen: patterns of parameter paths (`optim.matching_mask`); their gradient is zero.

    Raises:
        ConfigError: an unknown loss or communication, or a model without the loss's parameters.
    """
    _check(model, loss, communication, accumulate)
    over_rows = _OverRows.of(mesh)
    global_loss = _make_loss(mesh, loss, communication)

    def embed(params: tuple[Any, Any], batch_stats: Any, rows: tuple[Batch, Array]):
        batch, keys = rows
        clip = model.merge(_join(*params), batch_stats)
        training = Training(keys, over_rows.axis_names)
        pixels = batch.image
        if batch.box is not None:
            resize = functools.partial(crop_resize, size=preprocess.size)
            pixels = over_rows.by_itself(resize)(pixels, batch.box)
        with over_rows.tracing():
            image = clip.encode_image(
                preprocess.normalize(pixels), normalize=True, training=training
            )
            text = clip.encode_text(batch.tokens, normalize=True)
        return Embeddings(image, text), nnx.to_pure_dict(nnx.state(clip, nnx.BatchStat))

    def gradients(params: Any, batch_stats: Any, batch: Batch, keys: Array):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        stays = matching_mask(params, frozen)
        trained, rest = _split(params, stays | {name: True for name in _SCALARS if name in params})
        scalars = {name: params[name] for name in _SCALARS if name in params}
        copies, copies_of_rest = over_rows.copies((trained, rest))
        embed_rows = over_rows.map(embed)

        def embed_all(copies: Any, rows: tuple[Batch, Array]):
            return embed_rows((copies, copies_of_rest), batch_stats, rows)

        value, found, by_scalar, batch_stats = _exact_gradients(
            accumulate, mesh, embed_all, global_loss, scalars, copies, (batch, keys)
        )
        found = over_rows.sum(found)
        zeros = jax.tree.map(jnp.zeros_like, rest)  # never computed with: frozen
        by_scalar = {name: zeros[name] if stays[name] else g for name, g in by_scalar.items()}
        return value, _join(found, zeros) | by_scalar, batch_stats

    return gradients


@dataclasses.dataclass(frozen=True)
class _OverRows:
    """Runs a function on each device's own rows, or, without axes, on the whole batch at once.

    Attributes:
        mesh: of all devices.
        axis_names: the axes that split the rows; () leaves the work to the partitioner, which has
            none on one device. (XLA's cannot be trusted with a function of which it is given some
            axes only: it aborts on meshes that split parameters over two. And on a CPU it keeps a
            sum over one device, of all gradients, for which every update of a parameter waits.)
    """

    mesh: Mesh
    axis_names: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh) -> "_OverRows":
        return cls(mesh, BATCH_AXES if mesh.shape["data"] == mesh.size > 1 else ())

    def map(self, embed: Callable[..., Any]) -> Callable[..., Any]:
        """(copies, what all devices have, rows) -> (rows, what all have), each on its own rows."""
        if not self.axis_names:
            return embed
        return self._on_each(
            lambda copies, *rest: embed(jax.tree.map(lambda x: x[0], copies), *rest),
            (BATCH_SPEC, P(), BATCH_SPEC),
            (BATCH_SPEC, P()),
        )

    def by_itself(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """Rows -> rows, each device on its own even where the partitioner has the work."""
        return function if self.axis_names else self._on_each(function, BATCH_SPEC, BATCH_SPEC)

    def copies(self, params: Any) -> Any:
        """[...] -> [devices, ...]: parameters whose gradient is that of each device's own rows.

        They take no memory: each device has its own, which are the parameters.
        """
        if not self.axis_names:
            return params
        vary = functools.partial(jax.lax.pcast, axis_name=self.axis_names, to="varying")
        return self._on_each(
            lambda params: jax.tree.map(lambda x: vary(x)[None], params), P(), BATCH_SPEC
        )(params)

    def sum(self, gradients: Any) -> Any:
        """Of the copies: [devices, ...] -> [...], once and for all in their dtype."""
        if not self.axis_names:
            return gradients
        return self._on_each(
            lambda found: jax.lax.psum(jax.tree.map(lambda x: x[0], found), self.axis_names),
            BATCH_SPEC,
            P(),
        )(gradients)

    def _on_each(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """Around the model: it leaves the rows where they are."""
        if self.axis_names:
            return rows_lie()
        return rows_lie(
            batch_divisor(self.mesh),
            lambda axes: NamedSharding(self.mesh, P(BATCH_AXES, *[P.UNCONSTRAINED] * (axes - 1))),
        )


def _exact_gradients(count, mesh, embed, global_loss, scalars, copies, rows):
    """(loss, gradients of the copies and of the scalars, batch statistics) of `count` microbatches.

    The last one's activations stay until the gradient of the embeddings is there. The others leave
    nothing but their embeddings, and are embedded once more: the memory is one microbatch's, the
    price a forward pass of all but one.
    """
    divide, unite = _microbatches(count, mesh)
    earlier, last = divide(rows)

    def embed_again(total, rows_and_cotangents):
        # After the backward pass before it, even in a loop of one turn, which the compiler unrolls.
        total, (rows, cotangents) = jax.lax.optimization_barrier((total, rows_and_cotangents))
        _, backward, _ = jax.vjp(lambda copies: embed(copies, rows), copies, has_aux=True)
        return jax.tree.map(jnp.add, total, backward(cotangents)[0]), None

    if count > 1:
        of_earlier = jax.lax.map(functools.partial(embed, copies), earlier)
        # The last one's activations wait for the loss, but not for the others' forward passes.
        last, of_earlier = jax.lax.optimization_barrier((last, of_earlier))
    embeddings, backward, moved = jax.vjp(lambda copies: embed(copies, last), copies, has_aux=True)
    if count > 1:
        earlier_embeddings, earlier_moved = of_earlier
        embeddings = unite(earlier_embeddings, embeddings)
        moved = jax.tree.map(lambda x, y: (x.sum(axis=0) + y) / count, earlier_moved, moved)
    value, (by_scalar, cotangents) = jax.value_and_grad(global_loss, (0, 1))(scalars, embeddings)
    cotangents_of_earlier, of_last = divide(cotangents)
    (found,) = backward(of_last)
    if count > 1:
        found, _ = jax.lax.scan(embed_again, found, (earlier, cotangents_of_earlier))
    return value, found, by_scalar, moved


def _microbatches(count: int, mesh: Mesh) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    """[B, ...] -> [count - 1, B / count, ...] and the last [B / count, ...]; and the way back.

    Each is made of every device's own rows. Of one microbatch the first part is None.
    """
    if count == 1:
        return lambda tree: (None, tree), lambda _, last: last
    devices = batch_divisor(mesh)

    def placed(x: Array, spec: P) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def divided(x: Array) -> Array:
        x = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return placed(x.reshape(count, -1, *x.shape[3:]), P(None, BATCH_AXES))

    def united(earlier: Array, last: Array) -> Array:
        x = jnp.concatenate([earlier, last[None]])
        x = x.reshape(count, devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return placed(x.reshape(-1, *x.shape[3:]), BATCH_SPEC)

    def divide(tree: Any) -> tuple[Any, Any]:
        tree = jax.tree.map(divided, tree)
        return jax.tree.map(lambda x: x[:-1], tree), jax.tree.map(lambda x: x[-1], tree)

    return divide, functools.partial(jax.tree.map, united)


def _make_loss(mesh: Mesh, loss: str, communication: str) -> Callable[..., Array]:
    """The loss of the global batch, of (scalar parameters, embeddings)."""

    def local(scalars: dict[str, Array], embeddings: Embeddings) -> Array:
        scale = jnp.exp(scalars["logit_scale"])
        kwargs: dict[str, Any] = {"axis_names": BATCH_AXES, "communication": communication}
        if loss == "sigmoid":
            return sigmoid_loss(*embeddings, scale, scalars["logit_bias"], **kwargs)
        return softmax_loss(*embeddings, scale, **kwargs)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), BATCH_SPEC), out_specs=P())


def _split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Two trees of the same structure: None stands where the other has the leaf."""
    return (
        jax.tree.map(lambda x, other: None if other else x, tree, mask),
        jax.tree.map(lambda x, other: x if other else None, tree, mask),
    )


def _join(tree: Any, rest: Any) -> Any:
    return jax.tree.map(
        lambda x, other: other if x is None else x, tree, rest, is_leaf=lambda x: x is None
    )


def _check(model: AbstractModel, loss: str, communication: str, accumulate: int) -> None:
    for key, value, known in (
        ("loss", loss, get_args(Loss)),
        ("loss_communication", communication, get_args(Communication)),
    ):
        if value not in known:
            raise ConfigError(f"train.{key}={value!r}: choose one of {', '.join(known)}")
    if loss == "sigmoid" and "logit_bias" not in model.params:
        raise ConfigError(
            "train.loss='sigmoid' learns a bias, which this model has not; "
            "set config.model.logit_bias=True"
        )
    if accumulate < 1:
        raise ConfigError(f"train.accumulate={accumulate} must be at least 1")
