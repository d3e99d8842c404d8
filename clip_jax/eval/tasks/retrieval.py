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
from clip_jax.sharding import BATCH_AXES, batch_divisor, shard_batch

# Images of a device, and texts, whose scores are computed at a time: 4 MB, which a CPU still has in
# its cache when it compares them. Less than 2**15: two counts of a block share a number of 32 bits.
_BLOCK = 1024


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

    Every score is computed once and compared both ways. What it is compared with, the scores of the
    pairs that belong together, must be known before; the few blocks that hold them are computed
    twice, by the same program, so that a score equals itself to the last bit.

    Args:
        image: unit length.
        text: unit length.
        owner: the image of each text; every image has one.
        mesh: whose devices share out the images; each holds all the texts.
    """
    order = np.argsort(owner, kind="stable")  # the blocks with own pairs lie along the diagonal
    owner = owner[order]
    blocks = _Blocks(image, text[order], owner, mesh)
    own = blocks.own_scores()
    first = np.searchsorted(owner, np.arange(len(image)))
    best = np.maximum.reduceat(own, first)
    own_tied = np.add.reduceat((own == best[owner]).astype(np.int32), first)
    (higher, tied), (text_higher, text_tied) = blocks.compare(best, own)
    back = np.argsort(order, kind="stable")
    return {
        "text": (higher, tied - own_tied, own_tied),
        "image": (text_higher[back], text_tied[back] - 1, np.ones(len(text), np.int32)),
    }


class _Blocks:
    """The scores of all images with all texts, a block at a time.

    Rows behind the last image or text are NaN: such a score is neither above nor equal to another.
    """

    def __init__(
        self,
        image: Float[np.ndarray, "N E"],
        text: Float[np.ndarray, "M E"],
        owner: Int[np.ndarray, " M"],
        mesh: Mesh,
    ):
        devices = batch_divisor(mesh)
        self._rows = min(_BLOCK, -(-len(image) // devices)) * devices
        self._columns = min(_BLOCK, len(text))
        self._owner, self._mesh, self._lengths = owner, mesh, (len(image), len(text))
        self._images = self._shared_out(image)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._texts = [
            jax.make_array_from_process_local_data(everywhere, part, part.shape)
            for part in _parts(text, self._columns)
        ]

    def _shared_out(self, rows: np.ndarray) -> list[Array]:
        """A block at a time, on the devices that compare its images."""
        hosts, host = jax.process_count(), jax.process_index()
        own = slice(host * self._rows // hosts, (host + 1) * self._rows // hosts)
        return [shard_batch(part[own], self._mesh) for part in _parts(rows, self._rows)]

    def own_scores(self) -> Float[np.ndarray, " M"]:
        """The score of each text with its own image."""
        rows, columns = self._rows, self._columns
        found = np.full(len(self._texts) * columns, np.nan, np.float32)
        block_of = self._owner // rows
        for j, texts in enumerate(self._texts):
            here = slice(j * columns, min((j + 1) * columns, len(self._owner)))
            for i in np.unique(block_of[here]):
                row = np.zeros(columns, np.int32)
                row[: here.stop - here.start] = np.clip(self._owner[here] - i * rows, 0, rows - 1)
                scores = np.asarray(_picked(_scores(self._images[i], texts), row, self._mesh))
                own = np.flatnonzero(block_of[here] == i)
                found[here.start + own] = scores[own]
        return found[: len(self._owner)]

    def compare(
        self, best: Float[np.ndarray, " N"], own: Float[np.ndarray, " M"]
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Scores above, and equal to, `best` of each image; those to `own` of each text."""
        thresholds = self._shared_out(best), _parts(own, self._columns)
        counts = _no_counts(
            len(self._images), len(self._texts), self._rows, self._columns, self._mesh
        )
        for i, images in enumerate(self._images):
            for j, texts in enumerate(self._texts):
                place = np.int32(i), np.int32(j)
                counts = _add_counts(
                    counts, _scores(images, texts), thresholds[0][i], thresholds[1][j], place,
                    self._mesh,
                )  # fmt: skip
        (higher, tied), (text_higher, text_tied) = (
            np.asarray(each).reshape(2, -1)[:, :length]
            for each, length in zip(_totals(counts, self._mesh), self._lengths, strict=True)
        )
        return (higher, tied), (text_higher, text_tied)


def _parts(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Pieces of equal size; what the last one lacks is NaN."""
    padding = [(0, -len(array) % size)] + [(0, 0)] * (array.ndim - 1)
    padded = np.pad(array, padding, constant_values=np.nan)
    return list(padded.reshape(-1, size, *array.shape[1:]))


@jax.jit
def _scores(images: Float[Array, "b E"], texts: Float[Array, "m E"]) -> Float[Array, "b m"]:
    return jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="mesh")
def _picked(
    scores: Float[Array, "b m"], row: Int[np.ndarray | Array, " m"], mesh: Mesh
) -> Float[Array, " m"]:
    """Of each text the score with one image."""
    picked = jnp.take_along_axis(scores, row[None], axis=0)[0]
    return jax.lax.with_sharding_constraint(picked, NamedSharding(mesh, PartitionSpec()))


# By image and by text: above, and equal to, their threshold. A device counts for the images that it
# has and for all texts; nobody waits for another before the end. Axis letters: D devices; I blocks
# of b images; J blocks of m texts.
_Counts = tuple[Int[Array, "2 I b"], Int[Array, "D 2 J m"]]
_COUNTS_SPEC = PartitionSpec(None, None, BATCH_AXES), PartitionSpec(BATCH_AXES)


def _no_counts(image_blocks: int, text_blocks: int, rows: int, columns: int, mesh: Mesh) -> _Counts:
    shapes = (2, image_blocks, rows), (batch_divisor(mesh), 2, text_blocks, columns)
    by_image, by_text = (
        jnp.zeros(shape, jnp.int32, device=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, _COUNTS_SPEC, strict=True)
    )
    return by_image, by_text


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="counts")
def _add_counts(
    counts: _Counts,
    scores: Float[Array, "b m"],
    best: Float[Array, " b"],
    own: Float[np.ndarray | Array, " m"],
    place: tuple[Int[np.ndarray | Array, ""], Int[np.ndarray | Array, ""]],
    mesh: Mesh,
) -> _Counts:
    """Adds the scores of the block in a place."""

    def count(scores: Array, threshold: Array, axis: int) -> Array:
        # Both in one number: one pass over the scores instead of two.
        above = jnp.where(scores > threshold, 1 << 16, 0)
        both = jnp.sum(above + jnp.where(scores == threshold, 1, 0), axis=axis)
        return jnp.stack([both >> 16, both & 0xFFFF])

    def add(counts, scores, best, own, place):
        by_image, by_text = counts
        by_image = by_image.at[:, place[0]].add(count(scores, best[:, None], 1))
        return by_image, by_text.at[0, :, place[1]].add(count(scores, own[None], 0))

    everywhere, rows = PartitionSpec(), PartitionSpec(BATCH_AXES)
    in_specs = (_COUNTS_SPEC, rows, rows, everywhere, everywhere)
    mapped = jax.shard_map(add, mesh=mesh, in_specs=in_specs, out_specs=_COUNTS_SPEC)
    return mapped(counts, scores, best, own, place)


@functools.partial(jax.jit, static_argnames="mesh")
def _totals(counts: _Counts, mesh: Mesh) -> tuple[Int[Array, "2 I b"], Int[Array, "2 J m"]]:
    """Of all devices, on every host."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint((counts[0], counts[1].sum(axis=0)), everywhere)
