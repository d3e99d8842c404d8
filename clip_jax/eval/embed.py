"""Runs the towers over a data set or a list of texts, on all devices of all hosts."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from clip_jax.data.batches import eval_batches
from clip_jax.data.sources import Source
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import batch_divisor, shard_batch
from clip_jax.tokenizer import tokenize


class Embedded(NamedTuple):
    """A data set in the embedding space, in its own order; the same on every host."""

    image: Float[np.ndarray, "N E"]  # unit length, float32
    text: Float[np.ndarray, "N E"] | None  # where the examples have captions
    label: Int[np.ndarray, " N"] | None  # where they have labels


@functools.partial(jax.jit, static_argnames=("preprocess", "mesh"))
def _encode_image(
    model: CLIP, pixels: UInt8[Array, "B H W 3"], preprocess: Preprocess, mesh: Mesh
) -> Float[Array, "B E"]:
    embeddings = model.encode_image(preprocess.normalize(pixels), normalize=True)
    return jax.lax.with_sharding_constraint(embeddings, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("mesh",))
def _encode_text(model: CLIP, tokens: Int[Array, "B T"], mesh: Mesh) -> Float[Array, "B E"]:
    embeddings = model.encode_text(tokens, normalize=True)
    return jax.lax.with_sharding_constraint(embeddings, NamedSharding(mesh, PartitionSpec()))


def _float32(embeddings: Array) -> np.ndarray:
    return np.asarray(embeddings).astype(np.float32)


def embed_images(
    model: CLIP, preprocess: Preprocess, pixels: UInt8[np.ndarray, "b H W 3"], mesh: Mesh
) -> Float[np.ndarray, "B E"]:
    """Unit-length embeddings of one batch, each host giving its rows and getting all."""
    return _float32(_encode_image(model, shard_batch(pixels, mesh), preprocess, mesh))


def embed_texts(
    model: CLIP, texts: Sequence[str], mesh: Mesh, batch_size: int
) -> Float[np.ndarray, "N E"]:
    """Unit-length embeddings of texts; every host passes the same texts and gets all of them."""
    tokens = tokenize(texts, model.config.text.context_length, truncate=True)
    batch_size = _round_up(batch_size, batch_divisor(mesh))
    rows = batch_size // jax.process_count()
    own = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    embedded = []
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        embeddings = _encode_text(model, shard_batch(padded[own], mesh), mesh)
        embedded.append(_float32(embeddings)[: len(batch)])
    return np.concatenate(embedded)


def embed_dataset(
    model: CLIP, preprocess: Preprocess, source: Source, mesh: Mesh, batch_size: int
) -> Embedded:
    """Unit-length embeddings of every example once; the padding of the last batch is left out."""
    batch_size = _round_up(batch_size, batch_divisor(mesh))
    image, text, label = [], [], []
    for batch in eval_batches(source, preprocess, batch_size):
        valid = _gather(batch.valid)
        image.append(embed_images(model, preprocess, batch.image, mesh)[valid])
        if "caption" in batch.features:
            captions = [caption.decode("utf-8") for caption in batch.features["caption"]]
            tokens = tokenize(captions, model.config.text.context_length, truncate=True)
            text.append(_float32(_encode_text(model, shard_batch(tokens, mesh), mesh))[valid])
        if "label" in batch.features:
            label.append(_gather(batch.features["label"])[valid])
    return Embedded(
        np.concatenate(image),
        np.concatenate(text) if text else None,
        np.concatenate(label) if label else None,
    )


def _gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all hosts, in the order in which `shard_batch` puts them together."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
