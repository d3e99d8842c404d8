"""Runs the towers over pictures and texts, on all devices of all hosts."""

import collections
import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from clip_jax.data.labelled import Example, Labelled
from clip_jax.errors import DataError
from clip_jax.eval.registry import ClassName
from clip_jax.models import CLIP
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import batch_divisor, shard_batch
from clip_jax.tokenizer import Tokenizer
from clip_jax.tokenizers import AnyTokenizer

# Texts are cut to a multiple of this many tokens: prompts seldom need a quarter of the context.
_LENGTH_STEP = 16
_THREADS = 16  # that read and decode pictures
_AHEAD = 512  # pictures that they may be ahead, at most


class Embedded(NamedTuple):
    """A data set in the embedding space, in its own order; the same on every host."""

    image: Float[np.ndarray, "N E"]  # unit length, float32
    features: Float[np.ndarray, "N D"] | None  # of the penultimate layer, where asked for
    label: Int[np.ndarray, "N *labels"] | None  # where the examples have labels
    text: Float[np.ndarray, "M E"] | None  # unit length; where they have captions
    owner: Int[np.ndarray, " M"] | None  # the row of `image` that a text belongs to
    places: Int[np.ndarray, " N"]  # in the source; unreadable pictures have no row
    unreadable: int  # pictures that did not decode


class _Row(NamedTuple):
    place: int
    example: Example
    pixels: np.ndarray | None  # None: unreadable


@functools.partial(jax.jit, static_argnames=("preprocess", "features", "mesh"))
def _encode_image(
    model: CLIP,
    pixels: UInt8[Array, "B H W 3"],
    preprocess: Preprocess,
    features: bool,
    mesh: Mesh,
) -> tuple[Float[Array, "B E"], Float[Array, "B D"] | None]:
    images = preprocess.normalize(pixels)
    embeddings = model.encode_image(images, normalize=True)
    inside = model.visual.pooled(images) if features else None
    return _everywhere((embeddings, inside), mesh)


@functools.partial(jax.jit, static_argnames=("mesh",))
def _encode_text(model: CLIP, tokens: Int[Array, "B T"], mesh: Mesh) -> Float[Array, "B E"]:
    return _everywhere(model.encode_text(tokens, normalize=True), mesh)


def _everywhere(tree, mesh: Mesh):
    def whole(array: Array) -> Array:
        array = array.astype(jnp.float32)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(whole, tree)


class Encoder:
    """A model on a mesh, ready to embed.

    Args:
        model: on the mesh, or on the default device.
        preprocess: that of the model.
        mesh: whose devices share out the work.
        batch_size: of all devices together; rounded up to what they can share out.
        tokenizer: that of the model; None: CLIP's.
    """

    def __init__(
        self,
        model: CLIP,
        preprocess: Preprocess,
        mesh: Mesh,
        batch_size: int = 256,
        tokenizer: AnyTokenizer | None = None,
    ):
        self.model = model
        self.preprocess = preprocess
        self.mesh = mesh
        self.batch_size = _round_up(batch_size, batch_divisor(mesh))
        self._tokenizer = tokenizer or Tokenizer(model.config.text.context_length)
        self._classes: dict[tuple[tuple[str, ...], tuple[str, ...]], np.ndarray] = {}

    @property
    def logit_scale(self) -> float:
        """The factor that makes logits of cosines."""
        return float(np.exp(np.asarray(self.model.logit_scale[...])))

    def images(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N E"]:
        """Unit-length embeddings of pictures that were brought to size; the same on every host."""
        found = []
        for start in range(0, len(pixels), self.batch_size):
            batch = pixels[start : start + self.batch_size]
            size = self._batch_for(len(batch))
            padded = np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
            own = padded[_own_rows(size)]
            embeddings, _ = self._encode(own, features=False)
            found.append(np.asarray(embeddings)[: len(batch)])
        return np.concatenate(found)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Unit-length embeddings of texts; every host passes the same ones and gets all."""
        return self._tokens(self._tokenizer(texts, truncate=True))

    def class_vectors(
        self, classes: Sequence[ClassName], templates: Sequence[str]
    ) -> Float[np.ndarray, "C E"]:
        """The paper's prompt ensemble (section 3.1.4): one unit-length vector a class.

        Every template is filled with every name of the class and encoded; a class is the mean of
        its unit-length embeddings, brought to unit length. What was asked for once is kept.
        """
        keys = [(entry.prompts, tuple(templates)) for entry in classes]
        missing = list(dict.fromkeys(key for key in keys if key not in self._classes))
        prompts = [[t.format(name) for name in names for t in templates] for names, _ in missing]
        if missing:
            embeddings = self.texts(list(itertools.chain.from_iterable(prompts)))
            ends = np.cumsum([len(of_class) for of_class in prompts])[:-1]
            for key, rows in zip(missing, np.split(embeddings, ends), strict=True):
                mean = rows.mean(axis=0)
                self._classes[key] = mean / np.linalg.norm(mean)
        return np.stack([self._classes[key] for key in keys])

    def source(self, source: Labelled, features: bool = False) -> Embedded:
        """Embeds every example once; padding and unreadable pictures are left out.

        Args:
            source: read by all hosts, each decoding its share.
            features: also those of the penultimate layer, for linear probes.

        Raises:
            DataError: no picture, or none that can be read.
        """
        parts: list[_Part] = []
        pending: tuple[_Part, tuple[Array, Array | None]] | None = None
        rows = _decoded_rows(source, self.preprocess)
        own_size = self.batch_size // jax.process_count()
        for batch in _batches_on_all_hosts(rows, own_size):
            pixels = np.zeros((own_size, self.preprocess.size, self.preprocess.size, 3), np.uint8)
            for number, row in enumerate(batch):
                if row.pixels is not None:
                    pixels[number] = row.pixels
            started = (_Part.of(batch, own_size), self._encode(pixels, features))
            if pending is not None:  # fetched a batch late, so that devices and hosts overlap
                parts.append(pending[0].with_results(*pending[1]))
            pending = started
        if pending is not None:
            parts.append(pending[0].with_results(*pending[1]))
        whole = _join(parts, source)
        text, owner = self._captions([row for part in parts for row in part.rows])
        owner_rows = None
        if owner is not None and text is not None:
            row_of = np.full(whole.places.max() + 1, -1)
            row_of[whole.places] = np.arange(len(whole.places))
            readable = np.isin(owner, whole.places)
            text, owner_rows = text[readable], row_of[owner[readable]]
        return whole._replace(text=text, owner=owner_rows)

    def _encode(self, pixels: np.ndarray, features: bool) -> tuple[Array, Array | None]:
        batch = shard_batch(pixels, self.mesh)
        return _encode_image(self.model, batch, self.preprocess, features, self.mesh)

    def _tokens(self, tokens: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N E"]:
        """Encodes texts of like length together, cut where all of them have ended."""
        embedded = np.zeros((len(tokens), self.model.config.embed_dim), np.float32)
        for length, rows in _by_length(tokens, self.model):
            for start in range(0, len(rows), self.batch_size):
                chosen = rows[start : start + self.batch_size]
                size = self._batch_for(len(chosen))
                batch = np.zeros((size, length), np.int32)
                batch[: len(chosen)] = tokens[chosen, :length]
                own = shard_batch(batch[_own_rows(size)], self.mesh)
                embedded[chosen] = np.asarray(_encode_text(self.model, own, self.mesh))[
                    : len(chosen)
                ]
        return embedded

    def _batch_for(self, rows: int) -> int:
        """A size for a batch that is not full: a power of two, so that few are compiled."""
        size = 1 << max(rows - 1, 0).bit_length()
        return min(_round_up(size, batch_divisor(self.mesh)), self.batch_size)

    def _captions(
        self, rows: Sequence[_Row]
    ) -> tuple[Float[np.ndarray, "M E"] | None, Int[np.ndarray, " M"] | None]:
        """Embeds the captions of the rows of all hosts, and says whose they are, by place."""
        captions = [(row.place, text) for row in rows for text in row.example.captions]
        tokens = self._tokenizer([text for _, text in captions], truncate=True)
        owner = np.array([place for place, _ in captions], np.int64)
        tokens, owner = _gather_ragged(tokens), _gather_ragged(owner)
        if not len(owner):
            return None, None
        order = np.argsort(owner, kind="stable")
        return self._tokens(tokens[order]), owner[order]


class _Part(NamedTuple):
    """A batch of all hosts: what came of it, without the rows that do not count."""

    rows: list[_Row]  # this host's
    place: np.ndarray
    valid: np.ndarray
    unreadable: int
    label: np.ndarray | None
    image: np.ndarray | None = None
    features: np.ndarray | None = None

    @classmethod
    def of(cls, rows: list[_Row], size: int) -> "_Part":
        place = np.zeros(size, np.int64)
        valid = np.zeros(size, bool)
        labels = [row.example.label for row in rows]
        shape = np.shape(labels[0]) if rows and labels[0] is not None else None
        label = None if shape is None else np.zeros((size, *shape), np.int64)
        for number, row in enumerate(rows):
            place[number], valid[number] = row.place, row.pixels is not None
            if label is not None:
                label[number] = row.example.label
        unreadable = _gather(np.array([len(rows) - valid.sum()]))
        kept = [row._replace(pixels=None) for row in rows if row.example.captions]
        # A host that has run out of examples does not know the labels' shape, but must join in.
        if jax.process_count() > 1:
            label = _gather_labels(label, size)
        return cls(kept, _gather(place), _gather(valid), int(unreadable.sum()), label)

    def with_results(self, image: Array, features: Array | None) -> "_Part":
        return self._replace(
            image=np.asarray(image)[self.valid],
            features=None if features is None else np.asarray(features)[self.valid],
            label=None if self.label is None else self.label[self.valid],
            place=self.place[self.valid],
        )


def _join(parts: Sequence[_Part], source: Labelled) -> Embedded:
    unreadable = sum(part.unreadable for part in parts)
    if not any(len(part.place) for part in parts):
        reason = f"none of its {unreadable} pictures can be read" if unreadable else "no example"
        raise DataError(f"{source.where}: {reason}")
    places = np.concatenate([part.place for part in parts])
    order = np.argsort(places)

    def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        found = [array for array in arrays if array is not None]
        return np.concatenate(found)[order] if found else None

    image = joined([part.image for part in parts])
    assert image is not None
    return Embedded(
        image=image,
        features=joined([part.features for part in parts]),
        label=joined([part.label for part in parts]),
        text=None,
        owner=None,
        places=places[order],
        unreadable=unreadable,
    )


def decode(image: bytes, preprocess: Preprocess) -> UInt8[np.ndarray, "size size 3"] | None:
    """A picture, brought to size as the model's `preprocess` does; None: it cannot be read."""
    try:
        with Image.open(io.BytesIO(image)) as picture:
            return preprocess.resize(picture)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return None  # what Pillow's decoders raise at broken files


def _decoded_rows(source: Labelled, preprocess: Preprocess) -> Iterator[_Row]:
    """This host's share of the examples, decoded by threads that are somewhat ahead."""
    host, hosts = jax.process_index(), jax.process_count()

    def work(place: int, example: Example) -> _Row:
        try:
            content = example.image()
        except OSError:
            content = b""
        return _Row(place, example, decode(content, preprocess))

    with ThreadPoolExecutor(_THREADS) as threads:
        waiting: collections.deque[Future[_Row]] = collections.deque()
        for place, example in enumerate(source.examples()):
            if place % hosts != host:
                continue
            waiting.append(threads.submit(work, place, example))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches_on_all_hosts(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    """Batches until no host has a row left; a host that has none gives empty ones till then."""
    while True:
        batch = list(itertools.islice(rows, size))
        if not _gather(np.array([len(batch)])).any():
            return
        yield batch


def _by_length(tokens: Int[np.ndarray, "N T"], model: CLIP) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of rows, and the number of tokens after which they need nothing.

    In a causal tower that reads its result at the end-of-text token, nothing after that token
    reaches the result: leaving it out is exact.
    """
    context = tokens.shape[1]
    config = model.config.text
    needed = np.full(len(tokens), context)
    if config.causal and config.pool == "eot":
        ends = tokens.argmax(axis=1) + 1
        needed = np.minimum(_round_up(ends, _LENGTH_STEP), context)
    for length in np.unique(needed):
        yield int(length), np.flatnonzero(needed == length)


def _own_rows(size: int) -> slice:
    rows = size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def _gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all hosts, in the order in which `shard_batch` puts them together."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def _gather_labels(label: np.ndarray | None, size: int) -> np.ndarray | None:
    width = 0 if label is None else (-1 if label.ndim == 1 else label.shape[1])
    widths = _gather(np.array([width]))
    if not widths.any():
        return None
    width = int(widths[widths != 0][0])
    if label is None:
        label = np.zeros(size if width < 0 else (size, width), np.int64)
    return _gather(label)


def _gather_ragged(rows: np.ndarray) -> np.ndarray:
    """The rows of all hosts, of which each may have another number."""
    if jax.process_count() == 1:
        return rows
    counts = _gather(np.array([len(rows)]))
    padding = ((0, int(counts.max()) - len(rows)),) + ((0, 0),) * (rows.ndim - 1)
    padded = _gather(np.pad(rows, padding))
    padded = padded.reshape(len(counts), -1, *rows.shape[1:])
    return np.concatenate([rows[:count] for rows, count in zip(padded, counts, strict=True)])


def _round_up(value, multiple: int):
    return -(-value // multiple) * multiple
