"""OpenAI's names: the released files, and the part of OpenCLIP's that is the same."""

import math
import re
from collections.abc import Mapping

from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from clip_jax.models.layers import Activation
from clip_jax.weights.mapping import Rule, Shape, prefixed
from clip_jax.weights.source import mlp_ratio

QKV = ("query", "key", "value")
HEAD_WIDTH = 64  # of every released model; no shape tells it


def norm(theirs: str, ours: str) -> list[Rule]:
    """A layer normalisation."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def linear(theirs: str, ours: str) -> list[Rule]:
    """A torch linear layer: its kernel is [out, in]."""
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", "o i -> i o"),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def fused(theirs: str, ours: str, parts: tuple[str, ...], joint: str = "_") -> list[Rule]:
    """Projections to heads in one matrix, one below the other."""
    return [
        Rule(
            f"{theirs}{joint}weight",
            tuple(f"{ours}/{part}/kernel" for part in parts),
            "(n k h) d -> n d k h" if len(parts) > 1 else "(k h) d -> d k h",
        ),
        Rule(
            f"{theirs}{joint}bias",
            tuple(f"{ours}/{part}/bias" for part in parts),
            "(n k h) -> n k h" if len(parts) > 1 else "(k h) -> k h",
        ),
    ]


def from_heads(theirs: str, ours: str) -> list[Rule]:
    """The projection that joins the heads again."""
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", "d (k h) -> k h d"),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


BLOCK = [
    *norm("ln_1", "ln_1"),
    *fused("attn.in_proj", "attention", QKV),
    *from_heads("attn.out_proj", "attention/out"),
    *norm("ln_2", "ln_2"),
    *linear("mlp.c_fc", "mlp/up"),
    *linear("mlp.c_proj", "mlp/down"),
]
BLOCKS = prefixed("transformer.resblocks.{layer}.", "transformer/blocks/", BLOCK)

TEXT = [
    Rule("token_embedding.weight", "token_embedding"),
    Rule("positional_embedding", "position_embedding"),
    *BLOCKS,
    *norm("ln_final", "ln_final"),
    Rule("text_projection", "projection"),
]

VISION_TRANSFORMER = [
    Rule("class_embedding", "class_embedding"),
    Rule("positional_embedding", "position_embedding"),
    Rule("conv1.weight", "patch_embedding/kernel", "d c p q -> (p q c) d"),
    *norm("ln_pre", "ln_pre"),
    *BLOCKS,
    *norm("ln_post", "ln_post"),
    Rule("proj", "projection"),
]


def convolution(conv: str, bn: str, our_conv: str, our_bn: str) -> list[Rule]:
    """A convolution without bias, and the batch normalisation after it."""
    return [
        Rule(f"{conv}.weight", f"{our_conv}/kernel", "o i h w -> h w i o"),
        *norm(bn, our_bn),
        Rule(f"{bn}.running_mean", f"{our_bn}/mean"),
        Rule(f"{bn}.running_var", f"{our_bn}/var"),
    ]


CONVOLUTIONS = convolution("conv{n}", "bn{n}", "conv{n}", "bn{n}")
FIRST = [
    *CONVOLUTIONS,
    *convolution("downsample.0", "downsample.1", "downsample_conv", "downsample_bn"),
]
REST = prefixed("layer{stage}.{layer}.", "stage{stage}/rest/", CONVOLUTIONS)
RESNET = [
    *prefixed("", "stem/", CONVOLUTIONS),
    *prefixed("layer{stage}.0.", "stage{stage}/first/", FIRST),
    *(Rule(rule.theirs, rule.ours, rule.axes, first_layer=1) for rule in REST),
    Rule("attnpool.positional_embedding", "pool/position_embedding"),
    *fused("attnpool.q_proj", "pool", ("query",), "."),
    *fused("attnpool.k_proj", "pool", ("key",), "."),
    *fused("attnpool.v_proj", "pool", ("value",), "."),
    *from_heads("attnpool.c_proj", "pool/out"),
]

SCALARS = [Rule("logit_scale", "logit_scale"), Rule("logit_bias", "logit_bias")]
RULES = [
    *prefixed("visual.", "visual/", [*VISION_TRANSFORMER, *RESNET]),
    *prefixed("", "text/", TEXT),
    *SCALARS,
]
# The causal mask, the released archives' three constants, and a counter that torch keeps.
IGNORED = (
    r".*attn_mask",
    r"input_resolution|context_length|vocab_size",
    r".*\.num_batches_tracked",
)


def architecture(
    shapes: Mapping[str, Shape], activation: Activation, prefix: str = ""
) -> CLIPConfig:
    """The architecture of a state dict with OpenAI's names, as far as the shapes tell it.

    What they do not tell is that of the released models: heads of width 64, and what `CLIPConfig`
    has by default.

    Args:
        shapes: of the arrays.
        activation: of both towers.
        prefix: of the text tower's names.

    Raises:
        KeyError: an array that every such model has is not there.
    """

    def count(pattern: str) -> int:
        return len({m.group(1) for name in shapes if (m := re.match(pattern, name))})

    vision: ViTConfig | ResNetConfig
    if "visual.conv1.weight" in shapes and "visual.layer1.0.conv1.weight" not in shapes:
        width, _, patch, _ = shapes["visual.conv1.weight"]
        has_class = "visual.class_embedding" in shapes
        grid = math.isqrt(shapes["visual.positional_embedding"][0] - has_class)
        vision = ViTConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            layers=count(r"visual\.transformer\.resblocks\.(\d+)\."),
            heads=width // HEAD_WIDTH,
            mlp_ratio=mlp_ratio(width, shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0]),
            activation=activation,
            pre_norm="visual.ln_pre.weight" in shapes,
        )
    else:
        width = shapes["visual.layer1.0.conv1.weight"][0]
        grid = math.isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1)
        vision = ResNetConfig(
            image_size=grid * 32,
            width=width,
            layers=tuple(count(rf"visual\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4)),
            heads=width * 32 // HEAD_WIDTH,
        )
    vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
    text = TextConfig(
        width=width,
        heads=width // HEAD_WIDTH,
        layers=count(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."),
        context_length=shapes[f"{prefix}positional_embedding"][0],
        vocab_size=vocabulary,
        mlp_ratio=mlp_ratio(width, shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]),
        activation=activation,
    )
    embed_dim = shapes[f"{prefix}text_projection"][1]
    return CLIPConfig(embed_dim, vision, text, logit_bias="logit_bias" in shapes)
