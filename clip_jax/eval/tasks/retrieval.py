"""Image-text retrieval both ways, exact, among all pictures and captions of a split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.errors import DataError
from clip_jax.eval.metrics import retrieval_statistics
from clip_jax.eval.outcome import Data, Options, Outcome, measured
from clip_jax.sharding import batch_divisor, shard_batch

_SCORES = 1 << 24  # that a device holds at once: 64 MB


def retrieval(data: Data, options: Options) -> Outcome:
    """Recall at 1, 5 and 10; a picture is found by any of its captions."""
    source, embedded = data.split("test"), data.embedded("test")
    if embedded.text is None or embedded.owner is None:
        raise DataError(f"{source.where} has no captions, which retrieval needs")
    images = len(embedded.image)
    captions = np.bincount(embedded.owner, minlength=images)
    if not captions.all():
        raise DataError(f"{source.where} has {np.sum(captions == 0)} pictures without a caption")
    counts = rank_both_ways(embedded.image, embedded.text, embedded.owner, data.encoder.mesh)
    statistics = retrieval_statistics(counts, embedded.owner, images)
    metrics, intervals = measured(statistics, images, options)
    notes = (f"{images} pictures, {len(embedded.text)} captions",)
    return Outcome(metrics, intervals, images, embedded.unreadable, notes)


def rank_both_ways(
    image: Float[np.ndarray, "N E"],
    text: Float[np.ndarray, "M E"],
    owner: Int[np.ndarray, " M"],
    mesh: Mesh,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `metrics.any_hit_at_k` asks of each query, for "text" and for "image" retrieval.

    Args:
        image: unit length.
        text: unit length.
        owner: the image of each text.
        mesh: whose devices share out the queries; each holds all the items.
    """
    own = np.arange(len(image))
    return {
        "text": _rank(image, text, own, owner, mesh),
        "image": _rank(text, image, owner, own, mesh),
    }


def _rank(
    queries: np.ndarray, items: np.ndarray, query_group: np.ndarray, item_group: np.ndarray, mesh
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    devices, hosts, host = batch_divisor(mesh), jax.process_count(), jax.process_index()
    per_device = min(max(_SCORES // len(items), 1), -(-len(queries) // devices))
    size = per_device * devices
    everywhere = NamedSharding(mesh, PartitionSpec())
    on_all = jax.make_array_from_process_local_data(everywhere, items, items.shape)
    own_items = _own_items(query_group, item_group)
    own = slice(host * size // hosts, (host + 1) * size // hosts)
    found = []
    for start in range(0, len(queries), size):
        padding = ((0, size - len(queries[start : start + size])), (0, 0))
        rows, wanted = (
            shard_batch(np.pad(array[start : start + size], padding)[own], mesh)
            for array in (queries, own_items)
        )
        counts = _counts(rows, on_all, wanted, mesh)
        found.append((size - padding[0][1], counts))  # fetched at the end: no device waits
    parts = [[np.asarray(each)[:length] for each in counts] for length, counts in found]
    higher, tied, own_tied = (np.concatenate(part) for part in zip(*parts, strict=True))
    return higher, tied, own_tied


def _own_items(query_group: np.ndarray, item_group: np.ndarray) -> Int[np.ndarray, "Q K"]:
    """The items of each query's group, -1 behind the last where others have more."""
    order = np.argsort(item_group, kind="stable")
    first = np.searchsorted(item_group[order], query_group, "left")
    end = np.searchsorted(item_group[order], query_group, "right")
    places = first[:, None] + np.arange(np.max(end - first))
    inside = places < end[:, None]
    return np.where(inside, order[np.minimum(places, len(order) - 1)], -1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="mesh")
def _counts(
    queries: Float[Array, "b E"],
    items: Float[Array, "M E"],
    own_items: Int[Array, "b K"],
    mesh: Mesh,
) -> tuple[Int[Array, " b"], Int[Array, " b"], Int[Array, " b"]]:
    """Others' items above the best own one, others' that tie with it, own ones that do."""
    scores = jnp.matmul(queries, items.T, precision=jax.lax.Precision.HIGHEST)
    # Gathered, not masked: no pass over all scores asks whose an item is.
    own = jnp.take_along_axis(scores, own_items, axis=1)
    own = jnp.where(own_items >= 0, own, -jnp.inf)
    best = jnp.max(own, axis=1, keepdims=True)
    own_tied = jnp.sum(own == best, axis=1)
    counts = (
        jnp.sum(scores > best, axis=1),
        jnp.sum(scores == best, axis=1) - own_tied,
        own_tied,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, everywhere), counts)
