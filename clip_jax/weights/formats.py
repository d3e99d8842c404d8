"""Which format a file or folder is in, told by what is in it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import logging

from clip_jax.errors import WeightsError
from clip_jax.models import CLIPConfig, available_models, model_config
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.weights import big_vision, files, open_clip, openai, transformers
from clip_jax.weights.mapping import Tensors
from clip_jax.weights.source import Source

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")
TOKENIZER_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.model")
# A released archive keeps its three constants beside its parameters.
OPENAI_CONSTANTS = {"input_resolution", "context_length", "vocab_size"}

Named = str | CLIPConfig | None


def describe(path: Path, named: Named = None) -> Source:
    """Finds out what a file or a folder holds.

    Args:
        path: local.
        named: the model, for what the files do not say.

    Raises:
        WeightsError: nothing that this program knows, damaged files, or a model it does not have.
    """
    if path.is_file():
        return _describe_file(path, named)
    if not path.is_dir():
        raise WeightsError(f"no such file or folder: {path}")
    for name in (open_clip.WEIGHTS, transformers.INDEX, transformers.WEIGHTS):
        if (path / name).is_file():
            return _describe_file(path / name, named)
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise WeightsError(
            f"{path}: expected one file of weights ({', '.join(SUFFIXES)}), found {names}"
            + ("; give the path of one of them" if found else "")
        )
    return _describe_file(found[0], named)


def _describe_file(path: Path, named: Named) -> Source:
    tensors = (
        files.open_shards(path)
        if path.name.endswith(".safetensors.index.json")
        else files.open_tensors(path)
    )
    names = tensors.shapes.keys()
    if "text_model.embeddings.token_embedding.weight" in names:
        return _transformers(tensors, path.parent, named)
    if "visual.trunk.pos_embed" in names or "visual.conv1.weight" in names:
        return _open_clip_or_openai(tensors, path.parent, named)
    if any(name.removeprefix("params/").startswith("txt/") for name in names):
        return big_vision.describe(tensors, _tokenizer_file(path.parent))
    listed = ", ".join(sorted(names)[:5])
    raise WeightsError(
        f"{path} holds no CLIP that this program knows: {len(names)} arrays, such as {listed}. "
        "Expected the names of OpenAI, OpenCLIP, Transformers (CLIP, SigLIP) or big_vision"
    )


def _tokenizer_file(folder: Path) -> str | None:
    return next((name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from error


def _transformers(tensors: Tensors, folder: Path, named: Named) -> Source:
    path = folder / transformers.CONFIG
    if path.is_file():
        config, kind = transformers.read_config(_json(path), str(path))
    elif named is not None:
        config = _config(named)
        kind = "siglip" if config.logit_bias else "clip"
        logging.warning("%s is not there: taking the architecture that was named", path)
    else:
        raise WeightsError(
            f"{tensors.source} has Transformers' names, and there is no {transformers.CONFIG} "
            "beside it, which says how many heads it has and which activation: put it there, or "
            "name the model"
        )
    size = config.vision.image_size
    path = folder / transformers.PREPROCESSOR
    newer = folder / transformers.PROCESSOR
    if path.is_file():
        preprocess = transformers.read_preprocess(_json(path), str(path), size, kind)
    elif newer.is_file():
        section = _json(newer).get("image_processor", {})
        preprocess = transformers.read_preprocess(section, str(newer), size, kind)
    else:
        preprocess = transformers.default_preprocess(size, kind)
        logging.warning("%s is not there: taking Transformers' own, %s", path, preprocess)
    tokenizer = transformers.read_tokenizer(kind, config, _tokenizer_file(folder))
    rules = transformers.RULES[kind]
    return Source(config, preprocess, tokenizer, tensors, rules, transformers.IGNORED)


def _open_clip_or_openai(tensors: Tensors, folder: Path, named: Named) -> Source:
    names = tensors.shapes.keys()
    path = folder / open_clip.CONFIG
    custom_text = any(name.startswith("text.") for name in names)
    timm = "visual.trunk.pos_embed" in names
    tokenizer = TokenizerSpec()
    preprocess = None
    if path.is_file():
        config, preprocess, tokenizer = open_clip.read_config(_json(path), str(path))
        if tokenizer.kind != "clip":
            file = _tokenizer_file(folder)
            spec = TokenizerSpec.siglip(config.text.vocab_size, tokenizer.clean, file)
            tokenizer = spec
    elif names >= OPENAI_CONSTANTS:
        config = openai.architecture(tensors.shapes, "quick_gelu")
    elif named is not None:
        config = _config(named)
        logging.warning("no %s: taking the architecture that was named", path)
    elif timm:
        raise WeightsError(
            f"{tensors.source} has a timm image tower, and there is no {open_clip.CONFIG} beside "
            "it, which says which: put it there, or name the model"
        )
    else:
        config = _config_by_shapes(tensors, "text." if custom_text else "")
    preprocess = preprocess or _default_preprocess(config, tensors.source)
    rules = open_clip.rules(config, custom_text, timm)
    return Source(config, preprocess, tokenizer, tensors, rules, openai.IGNORED)


def _default_preprocess(config: CLIPConfig, source: str) -> Preprocess:
    preprocess = Preprocess(config.vision.image_size)
    logging.info("%s does not say how pictures are preprocessed: as OpenAI does", source)
    return preprocess


def _config_by_shapes(tensors: Tensors, prefix: str) -> CLIPConfig:
    """The named model whose shapes these are; what shapes do not tell is taken from it."""
    try:
        found = openai.architecture(tensors.shapes, "quick_gelu", prefix)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{tensors.source} looks like OpenAI's or OpenCLIP's, but lacks {error}, or has it in "
            "another shape"
        ) from error
    for name in available_models():
        config = model_config(name)
        if _shapes_only(config) == _shapes_only(found):
            logging.warning(
                "%s does not say its activation and heads: taking those of %s, which has the same "
                "shapes (activation %s). Put its %s beside it, or name the model, if that is wrong",
                tensors.source,
                name,
                config.text.activation,
                open_clip.CONFIG,
            )
            return config
    logging.warning(
        "%s does not say its activation and heads, and no named model has its shapes: taking "
        "QuickGELU and heads of width %d, as OpenAI's models have. Put its %s beside it, or name "
        "the model, if that is wrong",
        tensors.source,
        openai.HEAD_WIDTH,
        open_clip.CONFIG,
    )
    return found


def _shapes_only(config: CLIPConfig) -> CLIPConfig:
    """Without what no shape tells, for comparison."""

    def plain(tower: Any) -> Any:
        fields: dict[str, Any] = {"heads": 0}
        if hasattr(tower, "mlp_ratio"):
            width = int(tower.width * tower.mlp_ratio)
            fields |= {"activation": "quick_gelu", "mlp_ratio": float(width)}
        return dataclasses.replace(tower, **fields)

    return dataclasses.replace(config, vision=plain(config.vision), text=plain(config.text))


def _config(named: str | CLIPConfig) -> CLIPConfig:
    return model_config(named) if isinstance(named, str) else named


def as_named(source: Source, name: str) -> Source:
    """OpenAI's weights from elsewhere, with OpenAI's architecture and preprocessing."""
    config = model_config(name)
    preprocess = Preprocess(config.vision.image_size)
    for part, found, expected in (
        ("architecture", source.config, config),
        ("preprocessing", source.preprocess, preprocess),
    ):
        if found != expected:
            logging.warning(
                "%s: its config gives another %s than %s has (%s); taking OpenAI's",
                source.tensors.source,
                part,
                name,
                found,
            )
    return source._replace(config=config, preprocess=preprocess)
