"""The contrastive losses: pure functions of embeddings, scale and bias.

Each is a sum over all N x N pairs of the global batch, and its gradient by their logits is
(P - I) / N: for softmax, P is the mean of the softmax along the rows and along the columns; for
sigmoid, the sigmoid of each logit. The functions work on the rows that one device holds;
`axis_names` are the mesh axes over which the batch is split, and the collectives go over them. Call
them inside `jax.shard_map`, or with no axes on a single device.

A device computes the logits of its own images with all texts, and of its own texts with all images:
twice the products (0.2 % of a ViT-B/16's step), but it then has the whole gradient of its own rows,
and no gradient is ever reduced. Because the loss is a scalar, the forward pass computes the
gradients, too, and the backward pass only scales them: the other devices' rows are needed once, and
nothing of size N outlives the loss.

Axis letters: b rows of this device, n columns of a block, N rows of the batch, E embedding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AxisNames = tuple[str, ...]
Communication = Literal["gather", "ring"]

# Logits that a device computes at a time: 64 MB in float32.
BLOCK_LOGITS = 2**24


def softmax_loss(
    image_bE: Float[Array, "b E"],
    text_bE: Float[Array, "b E"],
    logit_scale: Float[Array, ""],
    *,
    axis_names: AxisNames = (),
    communication: Communication = "gather",
    chunk: int | None = None,
) -> Float[Array, ""]:
    """CLIP's symmetric cross-entropy (InfoNCE) over the global batch (Radford et al., figure 3).

    Args:
        image_bE: unit-length image embeddings of this device's rows, float32 or bfloat16.
        text_bE: the text embeddings of the same rows.
        logit_scale: the factor itself, exp of the learned parameter; positive, float32.
        axis_names: mesh axes that split the batch; () when this device holds all of it.
        communication: "gather": each device gathers all embeddings once, in their dtype; "ring":
            devices hand their rows round, twice, and none holds more than two devices' rows.
        chunk: columns of logits computed at a time; None: as many as `BLOCK_LOGITS` allows.

    Returns:
        The mean of the two directions' cross-entropies, float32, the same on every device. Value
        and gradients are those of the whole batch, exactly; logits are float32.
    """
    exchange = _Exchange(axis_names, communication, chunk)
    return _with_gradients(functools.partial(_softmax, exchange), image_bE, text_bE, logit_scale)


def sigmoid_loss(
    image_bE: Float[Array, "b E"],
    text_bE: Float[Array, "b E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    *,
    axis_names: AxisNames = (),
    communication: Communication = "gather",
    chunk: int | None = None,
) -> Float[Array, ""]:
    """SigLIP's loss (Zhai et al., 2023): each of the N x N pairs is a match, or it is none.

    Args:
        image_bE: unit-length image embeddings of this device's rows, float32 or bfloat16.
        text_bE: the text embeddings of the same rows.
        logit_scale: the factor itself, exp of the learned parameter; float32.
        logit_bias: added to every logit; float32.
        axis_names: mesh axes that split the batch; () when this device holds all of it.
        communication: as in `softmax_loss`; the ring goes round once.
        chunk: as in `softmax_loss`.

    Returns:
        The sum over all pairs of the binary cross-entropies, over N; float32, the same on every
        device. Value and gradients are those of the whole batch, exactly; logits are float32.
    """
    exchange = _Exchange(axis_names, communication, chunk)
    function = functools.partial(_sigmoid, exchange)
    return _with_gradients(function, image_bE, text_bE, logit_scale, logit_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients(function: Callable[..., tuple[Array, Any]], *arguments: Array) -> Array:
    """The value of a function that returns (value, gradients by its arguments)."""
    return function(*arguments)[0]


def _scale_gradients(_function, gradients, cotangent):
    return jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradients)


_with_gradients.defvjp(lambda function, *arguments: function(*arguments), _scale_gradients)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """How a device meets the rows of the others."""

    axis_names: AxisNames
    communication: Communication
    chunk: int | None

    @property
    def devices(self) -> int:
        return jax.lax.axis_size(self.axis_names) if self.axis_names else 1

    @property
    def index(self) -> Int[Array, ""] | int:
        return jax.lax.axis_index(self.axis_names) if self.axis_names else 0

    def sum(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        """Over all devices, in one collective."""
        return tuple(
            jax.lax.psum(jnp.stack(values), self.axis_names) if self.axis_names else values
        )

    def share(self, rows: Any) -> Any:
        """Makes what `fold` goes over of a pytree of this device's rows."""
        if self.devices == 1 or self.communication == "ring":
            return rows
        return jax.lax.all_gather(rows, self.axis_names, tiled=True)

    def fold(self, visit: Callable[[Any, Any, Any], Any], carry: Any, shared: Any) -> Any:
        """Calls `carry = visit(carry, block, first)` until every row of the batch was in a block.

        Args:
            visit: `block` is a pytree of n rows, of which the first is row `first` of the batch.
            carry: the first carry, the same on every device.
            shared: what `share` returned.
        """
        if self.axis_names:
            carry = jax.lax.pcast(carry, self.axis_names, to="varying")
        if self.devices == 1 or self.communication == "gather":
            return self._fold_block(visit, carry, shared, 0)
        devices, own = self.devices, self.index
        rows = jax.tree.leaves(shared)[0].shape[0]
        to_next = [(device, (device + 1) % devices) for device in range(devices)]

        def turn(state, number):
            carry, block = state
            following = jax.lax.ppermute(block, self.axis_names, to_next)  # while this is computed
            carry = self._fold_block(visit, carry, block, (own - number) % devices * rows)
            return (carry, following), None

        (carry, block), _ = jax.lax.scan(turn, (carry, shared), jnp.arange(devices - 1))
        return self._fold_block(visit, carry, block, (own + 1) % devices * rows)

    def _fold_block(self, visit, carry, block, first):
        """Divides one block into chunks; the last may be smaller."""
        rows = jax.tree.leaves(block)[0].shape[0]
        own_rows = rows if self.communication == "ring" else rows // self.devices
        chunk = min(rows, self.chunk or max(1, BLOCK_LOGITS // own_rows))
        if chunk == rows:
            return visit(carry, block, first)
        whole = rows // chunk

        def visit_chunk(carry, number):
            start = number * chunk
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), block)
            return visit(carry, part, first + start), None

        carry, _ = jax.lax.scan(visit_chunk, carry, jnp.arange(whole))
        if rows % chunk:
            rest = jax.tree.map(lambda x: x[whole * chunk :], block)
            carry = visit(carry, rest, first + whole * chunk)
        return carry

    def paired(self, shape: tuple[int, int], first: Any) -> Bool[Array, "b n"]:
        """True where row and column of a block of logits belong to the same pair."""
        rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + self.index * shape[0]
        return rows == jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first


_PerSide = tuple[Array, Array]  # of the images' rows, and of the texts'


class _Gradients(NamedTuple):
    """Sums over the blocks seen so far; times 1 / N they are gradients."""

    image_bE: Array
    text_bE: Array
    scale: Array
    bias: Array
    loss: Array  # not a gradient, but it is summed along with them

    @classmethod
    def zero(cls, image_bE: Array) -> "_Gradients":
        embeddings, scalar = jnp.zeros(image_bE.shape, jnp.float32), jnp.float32(0)
        return cls(embeddings, embeddings, scalar, scalar, scalar)

    def add(self, deviations: _PerSide, similarities: _PerSide, columns: _PerSide) -> "_Gradients":
        """Adds a block, given P - I of both sides' rows."""
        by_image, by_text = (
            jnp.matmul(
                deviation_bn.astype(column_nE.dtype),
                column_nE,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            for deviation_bn, column_nE in zip(deviations, columns, strict=True)
        )
        # Every pair is in the rows of one image: the other side would count it again.
        return self._replace(
            image_bE=self.image_bE + by_image,
            text_bE=self.text_bE + by_text,
            scale=self.scale + jnp.sum(deviations[0] * similarities[0]),
            bias=self.bias + jnp.sum(deviations[0]),
        )


class _Normalizer(NamedTuple):
    """The sum of exp(scale * similarity) along rows, as total * exp(scale * peak).

    Differences of similarities are taken before the scale multiplies their rounding.
    """

    peak_b: Array
    total_b: Array

    @classmethod
    def empty(cls, rows: int) -> "_Normalizer":
        return cls(jnp.full(rows, jnp.finfo(jnp.float32).min), jnp.zeros(rows, jnp.float32))

    def add(self, similarities_bn: Array, scale: Array) -> "_Normalizer":
        peak_b = jnp.maximum(self.peak_b, similarities_bn.max(axis=1))
        total_b = self.total_b * jnp.exp(scale * (self.peak_b - peak_b))
        terms_bn = jnp.exp(scale * (similarities_bn - peak_b[:, None]))
        return _Normalizer(peak_b, total_b + terms_bn.sum(axis=1))

    def softmax(self, similarities_bn: Array, scale: Array, axis: int) -> Array:
        """Of rows that were added (axis 1), or of columns that were rows elsewhere (axis 0)."""
        peak, total = (jnp.expand_dims(x, axis) for x in self)
        return jnp.exp(scale * (similarities_bn - peak)) / total

    def cross_entropy(self, paired_b: Array, scale: Array) -> Array:
        return scale * (self.peak_b - paired_b) + jnp.log(self.total_b)


def _similarities(own_bE: Array, other_nE: Array) -> Array:
    """Cosines in float32 whatever the dtype of the embeddings."""
    return jnp.einsum(
        "be,ne->bn",
        own_bE,
        other_nE,
        precision=jax.lax.Precision.HIGHEST,  # TPUs would round float32 factors to bfloat16
        preferred_element_type=jnp.float32,
    )


def _both_similarities(own: _PerSide, columns: _PerSide) -> _PerSide:
    return _similarities(own[0], columns[0]), _similarities(own[1], columns[1])


def _softmax(exchange: _Exchange, image_bE: Array, text_bE: Array, scale: Array):
    """The loss and its gradients by image, text and scale."""
    own = (image_bE, text_bE)
    columns = exchange.share((text_bE, image_bE))
    rows = image_bE.shape[0]

    def add_to_normalizers(normalizers, block, _first):
        similarities = _both_similarities(own, block)
        return tuple(n.add(s, scale) for n, s in zip(normalizers, similarities, strict=True))

    normalizers = exchange.fold(add_to_normalizers, (_Normalizer.empty(rows),) * 2, columns)

    def add_to_gradients(carry, block, first):
        gradients, paired_b = carry
        block, normalizers_of_block = block
        similarities = _both_similarities(own, block)
        paired_bn = exchange.paired(similarities[0].shape, first)
        # Of the products that are normalised, lest two ways of rounding differ, times the scale.
        paired_b += jnp.where(paired_bn, similarities[0], 0).sum(axis=1)
        deviations = tuple(
            (by_row.softmax(s, scale, 1) + by_column.softmax(s, scale, 0)) / 2 - paired_bn
            for s, by_row, by_column in zip(
                similarities, normalizers, normalizers_of_block, strict=True
            )
        )
        return gradients.add(deviations, similarities, block), paired_b

    shared_normalizers = exchange.share(normalizers[::-1])
    start = _Gradients.zero(image_bE), jnp.zeros(rows, jnp.float32)
    gradients, paired_b = exchange.fold(add_to_gradients, start, (columns, shared_normalizers))
    losses = [normalizer.cross_entropy(paired_b, scale).sum() / 2 for normalizer in normalizers]
    loss, image, text, scale_gradient, _ = _finish(
        exchange, gradients._replace(loss=sum(losses)), image_bE, scale
    )
    return loss, (image, text, scale_gradient)


def _sigmoid(exchange: _Exchange, image_bE: Array, text_bE: Array, scale: Array, bias: Array):
    """The loss and its gradients by image, text, scale and bias."""
    own = (image_bE, text_bE)

    def add_block(gradients, block, first):
        similarities = _both_similarities(own, block)
        sign_bn = jnp.where(exchange.paired(similarities[0].shape, first), -1.0, 1.0)
        logits = [sign_bn * (scale * s + bias) for s in similarities]
        deviations = tuple(sign_bn * jax.nn.sigmoid(each) for each in logits)
        gradients = gradients.add(deviations, similarities, block)
        return gradients._replace(loss=gradients.loss + jax.nn.softplus(logits[0]).sum())

    columns = exchange.share((text_bE, image_bE))
    gradients = exchange.fold(add_block, _Gradients.zero(image_bE), columns)
    loss, *gradients = _finish(exchange, gradients, image_bE, scale)
    return loss, tuple(gradients)


def _finish(exchange: _Exchange, sums: _Gradients, image_bE: Array, scale: Array):
    """The loss, and the gradients by image, text, scale and bias, in the dtypes of these."""
    count = exchange.devices * image_bE.shape[0]
    loss, by_scale, by_bias = exchange.sum((sums.loss, sums.scale, sums.bias))
    by_image, by_text = (
        (scale / count * sum_bE).astype(image_bE.dtype) for sum_bE in (sums.image_bE, sums.text_bE)
    )
    return loss / count, by_image, by_text, by_scale / count, by_bias / count
