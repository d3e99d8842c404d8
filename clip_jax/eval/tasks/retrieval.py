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
    on_all, groups = (
        jax.make_array_from_process_local_data(everywhere, array, array.shape)
        for array in (items, item_group.astype(np.int32))
    )
    own = slice(host * size // hosts, (host + 1) * size // hosts)
    found = []
    for start in range(0, len(queries), size):
        block = queries[start : start + size]
        padding = size - len(block)
        rows = np.pad(block, ((0, padding), (0, 0)))[own]
        group = np.pad(query_group[start : start + size], (0, padding), constant_values=-1)
        group = group.astype(np.int32)[own]
        counts = _counts(shard_batch(rows, mesh), on_all, shard_batch(group, mesh), groups, mesh)
        found.append((len(block), counts))  # fetched at the end, so that no device waits
    parts = [[np.asarray(each)[:length] for each in counts] for length, counts in found]
    higher, tied, own_tied = (np.concatenate(part) for part in zip(*parts, strict=True))
    return higher, tied, own_tied


@functools.partial(jax.jit, static_argnames="mesh")
def _counts(
    queries: Float[Array, "b E"],
    items: Float[Array, "M E"],
    query_group: Int[Array, " b"],
    item_group: Int[Array, " M"],
    mesh: Mesh,
) -> tuple[Int[Array, " b"], Int[Array, " b"], Int[Array, " b"]]:
    """Others' items above the best own one, others' that tie with it, own ones that do."""
    scores = jnp.matmul(queries, items.T, precision=jax.lax.Precision.HIGHEST)
    own = query_group[:, None] == item_group[None]
    best = jnp.max(jnp.where(own, scores, -jnp.inf), axis=1, keepdims=True)
    counts = (
        jnp.sum(~own & (scores > best), axis=1),
        jnp.sum(~own & (scores == best), axis=1),
        jnp.sum(own & (scores == best), axis=1),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, everywhere), counts)
