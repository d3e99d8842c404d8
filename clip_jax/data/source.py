"""What every source is, whatever its format: shards that are read forward, and records in them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from clip_jax.data.faults import Fault

Features = dict[str, tf.Tensor]


class Record(NamedTuple):
    """One record as it was read.

    Attributes:
        key: its name in the shard, for the log.
        end: where the next one starts: an offset in the shard.
        fields: what `Source.fields` describes; nothing where there is a fault.
        size: bytes of the fields.
        fault: what is wrong with it.
    """

    key: str
    end: int
    fields: Mapping[str, Any]
    size: int = 0
    fault: Fault | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards, how they are read, and how a record becomes an image and its captions.

    Attributes:
        spec: the string that named it.
        shards: their paths, in their order. Where every picture is a file, a file is a shard.
        read: (number of a shard, offset, number of records before the offset) -> the records from
            there on. Raises `tf.errors.OpError` where the shard cannot be read.
        fields: of a record, as TensorFlow takes them; a list of strings has the shape [None].
        parse: fields -> features, in TensorFlow: `image`, the encoded picture; `captions` [K] and
            `weights` [K], what there is to choose from; where there are labels, `label`.
        has_captions: whether `captions` can hold any.
        label_names: what the integers of `label` stand for, where it has names.
        counts: records by shard, where they are known without reading.
    """

    spec: str
    shards: Sequence[str]
    read: Callable[[int, int, int], Iterator[Record]]
    fields: dict[str, tf.TensorSpec]
    parse: Callable[[Features], Features]
    has_captions: bool = True
    label_names: tuple[str, ...] | None = None
    counts: tuple[int, ...] | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the features have a `label`."""
        return "label" in self.features

    @property
    def features(self) -> dict[str, tf.TensorSpec]:
        """What `parse` gives."""
        records = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=self.fields)
        return records.map(tf.autograph.experimental.do_not_convert(self.parse)).element_spec


class Mixture(NamedTuple):
    """Sources, and how often a row comes from each."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]  # their sum is one

    @property
    def spec(self) -> str:
        """Names the sources and their weights."""
        if len(self.sources) == 1:
            return self.sources[0].spec
        return " + ".join(
            f"{weight:.6g} {source.spec}"
            for source, weight in zip(self.sources, self.weights, strict=True)
        )


def caption_fields(given: Any, default: Sequence[str] = ()) -> dict[str, float]:
    """A field, several, or fields with their probabilities -> probability by field.

    Args:
        given: "txt", ("txt", "json/alt"), or {"txt": 0.7, "json/alt": 0.3}; None for the default.
        default: fields of equal probability.
    """
    if given is None:
        given = tuple(default)
    if isinstance(given, str):
        given = (given,)
    if not hasattr(given, "items"):
        given = dict.fromkeys(given, 1.0)
    return {str(field): float(probability) for field, probability in given.items()}
