"""Where pairs come from: a spec -> a source, or a mixture of several.

Specs of one source:
    tfds:NAME:SPLIT         a prepared TFDS data set with an image and a caption or a label
    PATHS.tar               WebDataset shards, as img2dataset writes them
    TABLE.csv .tsv .jsonl   rows of a path and captions or a label
    FOLDER                  of shards; of class folders; or of pictures, with the caption in a .txt
                            beside each
    PATHS                   anything else: TFRecord shards, or .array_record, of tf.train.Example

PATHS is a path, a brace pattern ({00000..00099}, {a,b}), a wildcard, or several with commas
between; local or gs://.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from clip_jax.data.catalog import open_tfds
from clip_jax.data.files import TABLES, open_folder, open_table
from clip_jax.data.paths import expand_paths, is_folder, join, list_folder
from clip_jax.data.shards import open_examples, open_tars
from clip_jax.data.source import Mixture, Source, caption_fields
from clip_jax.errors import DataError

SHARDS = (".tar", ".tfrecord", ".tfrecords", ".array_record")

__all__ = ["Mixture", "Source", "open_mixture", "open_source"]


def open_source(spec: str | None, config: ConfigDict) -> Source:
    """Opens what a spec names.

    Args:
        spec: see the module's docstring.
        config: the `data` section: data_dir, image_field, captions.

    Raises:
        DataError: no spec, nothing there, or records without a picture or the captions asked for.
    """
    if not spec:
        raise DataError(
            "no data: set config.data.train to tfds:NAME:SPLIT, to shards such as "
            "gs://bucket/{00000..00099}.tar, to a table of paths and captions, or to a folder"
        )
    image, captions = config.image_field, caption_fields(config.captions)
    if spec.startswith("tfds:"):
        return open_tfds(spec, config.data_dir, image, captions)
    if is_folder(spec):
        shards = [name for name in list_folder(spec) if name.endswith(SHARDS)]
        if not shards:
            return open_folder(spec, spec)
        paths = [join(spec, name) for name in shards]
    else:
        paths = expand_paths(spec)
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise DataError(
            f"{spec!r} names files of several formats; mix them as [(spec, weight), ...]"
        )
    if kinds == {".tar"}:
        return open_tars(spec, paths, image, captions)
    if kinds == {"table"}:
        return open_table(spec, paths, image, captions)
    return open_examples(spec, [(path, 0, -1) for path in paths], image, captions)


def _kind(path: str) -> str:
    if path.endswith((".tar.gz", ".tgz", ".zip", ".parquet")):
        raise DataError(
            f"{path}: expected .tar, TFRecord, .csv, .tsv, .jsonl or a folder; unpack it first, or "
            "have img2dataset write WebDataset or TFRecord shards"
        )
    if path.endswith(TABLES):
        return "table"
    return ".tar" if path.endswith(".tar") else "examples"


def open_mixture(spec: Any, config: ConfigDict) -> Mixture:
    """Opens `config.data.train`.

    Args:
        spec: of one source; a list of specs, which are one source together; or a list of
            (spec, weight) or (spec, weight, captions), which are mixed: a row comes from a source
            with a probability proportional to its weight. `captions` as in `config.data.captions`.
        config: the `data` section.

    Raises:
        DataError: as `open_source`; or a list of something else.
    """
    if not spec or isinstance(spec, str):
        return Mixture((open_source(spec, config),), (1.0,))
    if not isinstance(spec, Sequence):
        raise DataError(f"config.data.train={spec!r} is neither a string nor a list")
    if all(isinstance(each, str) for each in spec):
        alone = [each for each in spec if each.startswith("tfds:") or is_folder(each)]
        if alone and len(spec) > 1:
            raise DataError(
                f"{alone[0]!r} among others in config.data.train; a list of specs takes paths of "
                "files of one format: mix them as [(spec, weight), ...]"
            )
        return Mixture((open_source(",".join(spec), config),), (1.0,))
    sources, weights = [], []
    for each in spec:
        if isinstance(each, str) or not 2 <= len(each) <= 3 or not float(each[1]) > 0:
            raise DataError(
                f"{each!r} in config.data.train; expected (spec, weight) with a weight above zero, "
                "or (spec, weight, captions)"
            )
        own = ConfigDict(config.to_dict(), convert_dict=False)
        if len(each) == 3:
            own.captions = each[2]
        sources.append(open_source(each[0], own))
        weights.append(float(each[1]))
    return Mixture(tuple(sources), tuple(weight / sum(weights) for weight in weights))
