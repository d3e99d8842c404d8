"""python -m clip_jax.convert SOURCE TARGET --to=transformers|open_clip|clip_jax.

SOURCE is whatever `clip_jax.load` takes; TARGET is a folder that is made. Every array arrives as it
was: there and back is bit-exact in float32.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from etils import epath
from safetensors.numpy import save_file

from clip_jax.checkpoint import ModelCard, save_weights
from clip_jax.errors import UserError, WeightsError
from clip_jax.loading import Weights, read_weights
from clip_jax.tokenizer import CONTEXT_LENGTH, SPECIAL_TOKENS, VOCAB_SIZE, load_vocabulary
from clip_jax.weights import open_clip, transformers
from clip_jax.weights.source import abstract_model, nest, to_tensors

_TO = flags.DEFINE_enum(
    "to", None, ["transformers", "open_clip", "clip_jax"], "The form to convert to."
)
_MODEL = flags.DEFINE_string("model", None, "The model's name, where SOURCE does not say it.")
flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
flags.mark_flags_as_required(["to"])

SPELLINGS = dict(zip(("<|startoftext|>", "<|endoftext|>"), SPECIAL_TOKENS.values(), strict=True))


def convert(
    source: epath.PathLike, target: epath.PathLike, to: str, *, model: str | None = None
) -> None:
    """Converts weights from any form that `load` reads.

    Args:
        source: what `load` takes.
        target: a folder; made, and must be empty if it is there.
        to: "transformers" (a folder for `from_pretrained`, processor and tokenizer included),
            "open_clip" (safetensors and config, for `local-dir:TARGET`) or "clip_jax" (a workdir).
        model: what `source` is, where it does not say.

    Raises:
        WeightsError: weights that cannot be read, or that the form has no model for.
        CheckpointError: there are checkpoints in the target already.
    """
    folder = epath.Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder} is there already, and not empty; choose another folder")
    weights = read_weights(source, model=model)
    writer = {
        "transformers": _to_transformers,
        "open_clip": _to_open_clip,
        "clip_jax": _to_clip_jax,
    }[to]
    writer(weights, folder)


def _to_transformers(weights: Weights, folder: epath.Path) -> None:
    config, kind = transformers.write_config(weights.config)
    tensors = to_tensors(transformers.RULES[kind], weights.config, _host(weights))
    local = _local(folder)
    _write_json(local / transformers.CONFIG, config)
    _write_json(
        local / transformers.PREPROCESSOR, transformers.write_preprocess(weights.preprocess, kind)
    )
    if weights.tokenizer.kind == "clip":
        _write_clip_tokenizer(local, weights.config.text.context_length)
    else:
        _copy_tokenizer(weights, local)
    save_file(tensors, local / transformers.WEIGHTS, metadata={"format": "pt"})


def _to_open_clip(weights: Weights, folder: epath.Path) -> None:
    config, rules = open_clip.write_config(weights.config, weights.preprocess)
    tensors = to_tensors(rules, weights.config, _host(weights))
    local = _local(folder)
    if weights.tokenizer.kind != "clip":
        config["model_cfg"]["text_cfg"] |= {
            "hf_tokenizer_name": str(local),
            "tokenizer_kwargs": {"clean": weights.tokenizer.clean},
        }
        _copy_tokenizer(weights, local)
    _write_json(local / open_clip.CONFIG, config)
    save_file(tensors, local / open_clip.WEIGHTS, metadata={"format": "pt"})


def _to_clip_jax(weights: Weights, folder: epath.Path) -> None:
    _, *parts = abstract_model(weights.config)
    params, statistics = (nest({path: weights.arrays[path] for path in part}) for part in parts)
    card = ModelCard(weights.config, weights.preprocess, {}, weights.tokenizer)
    save_weights(folder, card, params, statistics)
    if weights.tokenizer.kind != "clip":
        _copy_tokenizer(weights, folder)


def _host(weights: Weights) -> Mapping[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in weights.arrays.items()}


def _local(folder: epath.Path) -> Path:
    if "://" in str(folder):
        raise WeightsError(f"{folder}: only --to=clip_jax writes elsewhere than on a local disk")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _copy_tokenizer(weights: Weights, folder: Path | epath.Path) -> None:
    """The SentencePiece model goes along, where the source had it."""
    if weights.tokenizer.file is None or weights.folder is None:
        logging.warning(
            "the SentencePiece model is not beside the source; put it into %s as spiece.model",
            folder,
        )
        return
    name = weights.tokenizer.file
    source = epath.Path(weights.folder) / name
    if isinstance(folder, Path):
        shutil.copyfile(source, folder / name)
    else:
        source.copy(folder / name)


def _write_clip_tokenizer(folder: Path, context_length: int = CONTEXT_LENGTH) -> None:
    """CLIP's vocabulary in the files that `CLIPTokenizer` reads."""
    symbols, merges = load_vocabulary()
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)} | SPELLINGS
    if len(vocabulary) != VOCAB_SIZE:
        raise WeightsError("the vocabulary is damaged; install clip_jax again")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = [f"{symbols[first]} {symbols[second]}" for first, second in merges]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    start, end = SPELLINGS
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "CLIPTokenizer",
            "processor_class": "CLIPProcessor",
            "model_max_length": context_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
    )


def main(arguments: list[str]) -> None:
    """Converts, and says what it wrote."""
    if len(arguments) != 3:
        sys.exit(f"expected SOURCE and TARGET, got {arguments[1:]}")
    _, source, target = arguments
    try:
        convert(source, target, str(_TO.value), model=_MODEL.value)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{source} -> {target} ({_TO.value})")


if __name__ == "__main__":
    app.run(main)
