"""Whatever the source holds -> (model, preprocess)."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jaxtyping import Array

from clip_jax.checkpoint import holds_checkpoint, load_card, load_params
from clip_jax.errors import WeightsError
from clip_jax.models import CLIP, CLIPConfig, resize_positions, unstack
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizers import AnyTokenizer, TokenizerSpec
from clip_jax.weights import formats, hub
from clip_jax.weights.source import Source, abstract_model, flatten, nest

Named = str | CLIPConfig | None


class Weights(NamedTuple):
    """A model taken apart: what a checkpoint holds."""

    config: CLIPConfig
    preprocess: Preprocess
    tokenizer: TokenizerSpec
    folder: Path | epath.Path | None  # where the tokenizer's file lies
    arrays: dict[str, Array]  # path -> parameter or running statistic, float32


def load(
    source: epath.PathLike,
    dtype: Any = jnp.float32,
    *,
    model: Named = None,
    image_size: int | None = None,
) -> tuple[CLIP, Preprocess]:
    """Loads a model and the preprocessing that it was trained with.

    What a source holds is found out by looking into it. Nothing in it is run: weights are data.

    Args:
        source: one of

            - a workdir of this program, or a checkpoint in it; local or gs://
            - a file or a folder of OpenAI, OpenCLIP, Transformers (CLIP, SigLIP) or big_vision
            - "hf:owner/name" or "hf:owner/name@revision" on the Hugging Face hub; cached
            - one of OpenAI's nine names, such as "ViT-B/32"; from the hub

        dtype: compute dtype; the parameters stay float32.
        model: what is loaded, where the source does not say: a name or an architecture.
        image_size: another resolution than the source's, in pixels; position tables are resized.

    Returns:
        The model, on the default device (on a CPU a layer at a time, see `models.unstack`), and the
        function that makes its input of a PIL picture:

        >>> model, preprocess = clip_jax.load("ViT-B/32")
        >>> image = model.encode_image(preprocess(picture)[None], normalize=True)
        >>> similarity = image @ model.encode_text(clip_jax.tokenize(texts), normalize=True).T

    Raises:
        WeightsError: no such source, or one that is damaged, of another kind or out of reach.
        CheckpointError: a checkpoint of this program that cannot be read.
    """
    weights = read_weights(source, model=model)
    if image_size is not None:
        weights = _resized(weights, image_size)
    graphdef, *parts = abstract_model(weights.config, dtype)
    params, statistics = (nest({path: weights.arrays[path] for path in part}) for part in parts)
    loaded = nnx.merge(graphdef, params, statistics)
    if jax.default_backend() == "cpu":
        loaded = unstack(loaded)
    return loaded, weights.preprocess


def load_tokenizer(
    source: epath.PathLike, *, model: Named = None, file: epath.PathLike | None = None
) -> AnyTokenizer:
    """The tokenizer that the source's model reads: texts -> int32 [B, T].

    For CLIP's own, and so for most models, `clip_jax.tokenize` does the same.

    Args:
        source: what `load` takes.
        model: likewise.
        file: of the SentencePiece model, where it is not beside the weights.

    Raises:
        WeightsError: as `load`; and a SentencePiece model that is missing.
    """
    path, named = _locate(source, formats.TOKENIZER_FILES)
    if holds_checkpoint(path):
        card = load_card(path)
        spec, folder, length = card.tokenizer, path, card.model.text.context_length
    else:
        found = _describe(path, named, model)
        spec, length = found.tokenizer, found.config.text.context_length
        folder = path if path.is_dir() else path.parent
    if file is not None:
        spec, folder = dataclasses.replace(spec, file=str(file)), None
    return spec.load(folder, length)


def read_weights(source: epath.PathLike, *, model: Named = None) -> Weights:
    """What `load` makes a model of, before it does; array by array on the default device.

    Raises:
        WeightsError, CheckpointError: as `load`.
    """
    path, named = _locate(source)
    if holds_checkpoint(path):
        card, params, statistics = load_params(path)
        arrays = flatten(params) | flatten(statistics)
        return Weights(card.model, card.preprocess, card.tokenizer, path, arrays)
    found = _describe(path, named, model)
    arrays = {name: jax.device_put(array) for name, array in found.arrays()}
    folder = path if path.is_dir() else path.parent
    return Weights(found.config, found.preprocess, found.tokenizer, folder, arrays)


def _locate(
    source: epath.PathLike, optional: Iterable[str] = ()
) -> tuple[Path | epath.Path, str | None]:
    """Where the files lie, fetched if need be; and OpenAI's name, if it was one."""
    path = epath.Path(source)
    if path.exists():
        return path, None
    text = str(source)
    if text.startswith(hub.PREFIX):
        return hub.fetch(text.removeprefix(hub.PREFIX), tuple(optional)), None
    if text in hub.OPENAI:
        return hub.fetch(hub.OPENAI[text]), text
    hint = f"; on the hub it would be {hub.PREFIX}{text}" if _LIKE_A_REPOSITORY(text) else ""
    raise WeightsError(
        f"nothing at {text}: expected a path that exists, {hub.PREFIX}owner/name, or one of "
        f"{', '.join(hub.OPENAI)}{hint}"
    )


_LIKE_A_REPOSITORY = re.compile(r"[\w-]+/[\w.-]+").fullmatch


def _describe(path: Path | epath.Path, named: str | None, model: Named) -> Source:
    if "://" in str(path):
        raise WeightsError(
            f"{path} is no checkpoint of this program; copy others' weights to a local disk first"
        )
    found = formats.describe(Path(path), model)
    return found if named is None else formats.as_named(found, named)


def _resized(weights: Weights, image_size: int) -> Weights:
    old = weights.config.vision
    new = dataclasses.replace(old, image_size=image_size)
    tree = resize_positions(nest(weights.arrays), old, new)
    return weights._replace(
        config=dataclasses.replace(weights.config, vision=new),
        preprocess=dataclasses.replace(weights.preprocess, size=image_size),
        arrays=flatten(tree),
    )
