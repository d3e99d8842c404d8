"""big_vision's names: SigLIP's `.npz` files, and those of LiT with a text transformer.

Such a file holds arrays only; what no shape tells is as big_vision has it: GELU by its tanh
approximation, flax's epsilon, pictures squashed to [-1, 1]. Interpolation is bicubic, as in the
other programs that hold the same weights; big_vision's own evaluation is bilinear, without
antialiasing.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from clip_jax.errors import WeightsError
from clip_jax.models import CLIPConfig, TextConfig, ViTConfig
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.weights.mapping import Rule, Shape, Tensors, prefixed
from clip_jax.weights.openai import QKV
from clip_jax.weights.source import Source, mlp_ratio

NORM_EPSILON = 1e-6
HALF = (0.5, 0.5, 0.5)
# Names that later versions changed.
MOVED = {
    "img/Transformer/posembed_input/pos_embedding": "img/pos_embedding",
    "img/Transformer/pos_embedding": "img/pos_embedding",
}
IGNORED = ("opt/.*",)


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/{part}", f"{ours}/{part}") for part in ("scale", "bias")]


def _dense(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/{part}", f"{ours}/{part}") for part in ("kernel", "bias")]


def _attention(theirs: str, ours: str) -> list[Rule]:
    parts = [*QKV, "out"]
    return [rule for part in parts for rule in _dense(f"{theirs}/{part}", f"{ours}/{part}")]


def _blocks(prefix: str, numbers: tuple[int, int, int, int], stacked: bool) -> list[Rule]:
    """A stack of blocks; `numbers` are those of the first norm, attention, second norm and MLP."""
    first, attention, second, mlp = numbers
    block = [
        *_norm(f"LayerNorm_{first}", "ln_1"),
        *_attention(f"MultiHeadDotProductAttention_{attention}", "attention"),
        *_norm(f"LayerNorm_{second}", "ln_2"),
        *_dense(f"MlpBlock_{mlp}/Dense_0", "mlp/up"),
        *_dense(f"MlpBlock_{mlp}/Dense_1", "mlp/down"),
    ]
    theirs = f"{prefix}/encoderblock/" if stacked else f"{prefix}/encoderblock_{{layer}}/"
    return prefixed(theirs, "transformer/blocks/", block)


NEW, OLD = (0, 0, 1, 0), (0, 1, 2, 3)  # flax counted modules by kind, and before that together


def rules(names: Mapping[str, Shape]) -> list[Rule]:
    """The table for the names that a file has: there are three ways to name a block."""

    def blocks(prefix: str) -> list[Rule]:
        stacked = f"{prefix}/encoderblock/LayerNorm_0/scale" in names
        old = f"{prefix}/encoderblock_0/LayerNorm_2/scale" in names
        return _blocks(prefix, OLD if old else NEW, stacked)

    image = [
        Rule("img/embedding/kernel", "patch_embedding/kernel", "p q c d -> (p q c) d"),
        Rule("img/embedding/bias", "patch_embedding/bias"),
        Rule("img/cls", "class_embedding", "1 1 d -> d"),
        Rule("img/pos_embedding", "position_embedding", "1 n d -> n d"),
        *blocks("img/Transformer"),
        *_norm("img/Transformer/encoder_norm", "ln_post"),
        Rule("img/MAPHead_0/probe", "pool/probe", "1 1 d -> d"),
        *_attention("img/MAPHead_0/MultiHeadDotProductAttention_0", "pool/attention"),
        *_norm("img/MAPHead_0/LayerNorm_0", "pool/ln"),
        *_dense("img/MAPHead_0/MlpBlock_0/Dense_0", "pool/mlp/up"),
        *_dense("img/MAPHead_0/MlpBlock_0/Dense_1", "pool/mlp/down"),
    ]
    text = [
        Rule("txt/Embed_0/embedding", "token_embedding"),
        Rule("txt/pos_embedding", "position_embedding", "1 t d -> t d"),
        *blocks("txt/Encoder_0"),
        *_norm("txt/Encoder_0/encoder_norm", "ln_final"),
        Rule("txt/head/kernel", "projection"),
        Rule("txt/head/bias", "projection_bias"),
    ]
    return [
        *prefixed("", "visual/", image),
        *prefixed("", "text/", text),
        Rule("t", "logit_scale", "1 ->"),
        Rule("b", "logit_bias", "1 ->"),
    ]


def describe(tensors: Tensors, tokenizer_file: str | None) -> Source:
    """What a file holds, told by its names and shapes.

    Raises:
        WeightsError: an image tower or a text tower that this program does not have.
    """
    tensors = tensors.renamed(lambda name: _modern(name.removeprefix("params/")))
    shapes = tensors.shapes
    if any("txt/BertEncoder" in name or "txt/bert" in name.lower() for name in shapes):
        raise WeightsError(f"{tensors.source}: the text tower is a BERT, which is not here")
    if "img/head/kernel" in shapes:
        raise WeightsError(
            f"{tensors.source}: the image tower ends in a head with a bias, which is not here"
        )
    try:
        vision, text = _vision(shapes), _text(shapes)
        config = CLIPConfig(shapes["txt/head/kernel"][1], vision, text, logit_bias="b" in shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{tensors.source} looks like big_vision's, but lacks {error}, or has it in another "
            "shape"
        ) from error
    logging.info(
        "%s says nothing of activation, epsilon and preprocessing: taking big_vision's "
        "(gelu_tanh, %g, squashed to [-1, 1], bicubic)",
        tensors.source,
        NORM_EPSILON,
    )
    return Source(
        config,
        Preprocess(vision.image_size, HALF, HALF, "squash", "bicubic"),
        TokenizerSpec.siglip(text.vocab_size, "lower", tokenizer_file),
        tensors,
        rules(shapes),
        IGNORED,
    )


def _modern(name: str) -> str:
    return MOVED.get(name, name)


def _block(shapes: Mapping[str, Shape], prefix: str) -> tuple[int, int, int]:
    """Layers, heads and MLP width of an encoder."""
    query = re.compile(
        rf"{prefix}/encoderblock(_\d+)?/MultiHeadDotProductAttention_\d/query/kernel"
    )
    found = [name for name in shapes if query.fullmatch(name)]
    stacked = len(found) == 1 and len(shapes[found[0]]) == 4
    layers = shapes[found[0]][0] if stacked else len(found)
    heads = shapes[found[0]][-2]
    (up, *_) = (
        name
        for name in shapes
        if re.fullmatch(rf"{prefix}/encoderblock(_0)?/MlpBlock_\d/Dense_0/kernel", name)
    )
    return layers, heads, shapes[up][-1]


def _vision(shapes: Mapping[str, Shape]) -> ViTConfig:
    patch, _, _, width = shapes["img/embedding/kernel"]
    layers, heads, mlp_width = _block(shapes, "img/Transformer")
    has_class = "img/cls" in shapes
    pool = "map" if "img/MAPHead_0/probe" in shapes else "class" if has_class else "mean"
    options: dict[str, Any] = {"pool": pool, "class_token": has_class}
    return ViTConfig(
        image_size=math.isqrt(shapes["img/pos_embedding"][1] - has_class) * patch,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=heads,
        mlp_ratio=mlp_ratio(width, mlp_width),
        activation="gelu_tanh",
        pre_norm=False,
        patch_bias=True,
        projection=False,
        norm_epsilon=NORM_EPSILON,
        **options,
    )


def _text(shapes: Mapping[str, Shape]) -> TextConfig:
    vocabulary, width = shapes["txt/Embed_0/embedding"]
    layers, heads, mlp_width = _block(shapes, "txt/Encoder_0")
    return TextConfig(
        width=width,
        heads=heads,
        layers=layers,
        context_length=shapes["txt/pos_embedding"][1],
        vocab_size=vocabulary,
        mlp_ratio=mlp_ratio(width, mlp_width),
        activation="gelu_tanh",
        pool="last",
        causal=False,
        projection_bias=True,
        norm_epsilon=NORM_EPSILON,
    )
