"""OpenCLIP's names and its `open_clip_config.json`: its own towers, and SigLIP's through timm."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from clip_jax.errors import WeightsError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from clip_jax.models.layers import Activation
from clip_jax.preprocess import MEAN, STD, Preprocess
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.weights.mapping import Rule, prefixed
from clip_jax.weights.openai import (
    HEAD_WIDTH,
    QKV,
    RESNET,
    SCALARS,
    TEXT,
    VISION_TRANSFORMER,
    from_heads,
    fused,
    linear,
    norm,
)
from clip_jax.weights.source import Reader, square

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"

TIMM_BLOCK = [
    *norm("norm1", "ln_1"),
    *fused("attn.qkv", "attention", QKV, "."),
    *from_heads("attn.proj", "attention/out"),
    *norm("norm2", "ln_2"),
    *linear("mlp.fc1", "mlp/up"),
    *linear("mlp.fc2", "mlp/down"),
]
TIMM_TRANSFORMER = [
    Rule("patch_embed.proj.weight", "patch_embedding/kernel", "d c p q -> (p q c) d"),
    Rule("patch_embed.proj.bias", "patch_embedding/bias"),
    Rule("pos_embed", "position_embedding", "1 n d -> n d"),
    *prefixed("blocks.{layer}.", "transformer/blocks/", TIMM_BLOCK),
    *norm("norm", "ln_post"),
    Rule("attn_pool.latent", "pool/probe", "1 1 d -> d"),
    *fused("attn_pool.q", "pool/attention", ("query",), "."),
    *fused("attn_pool.kv", "pool/attention", ("key", "value"), "."),
    *from_heads("attn_pool.proj", "pool/attention/out"),
    *norm("attn_pool.norm", "pool/ln"),
    *linear("attn_pool.mlp.fc1", "pool/mlp/up"),
    *linear("attn_pool.mlp.fc2", "pool/mlp/down"),
]
TEXT_WITH_BIAS = [
    *(rule for rule in TEXT if rule.theirs != "text_projection"),
    Rule("text_projection.weight", "projection", "e d -> d e"),
    Rule("text_projection.bias", "projection_bias"),
]

# timm's image towers of SigLIP, "vit_SIZE_patchP_siglip_RESOLUTION": width, layers, heads, MLP
# ratio, activation.
TIMM_NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
TIMM_SIZES: dict[str, tuple[int, int, int, float, Activation]] = {
    "base": (768, 12, 12, 4.0, "gelu"),
    "large": (1024, 24, 16, 4.0, "gelu"),
    "so400m": (1152, 27, 16, 3.7362, "gelu"),
    "giantopt": (1536, 40, 16, 4.0, "gelu_tanh"),
}
TIMM_RESOLUTIONS = {  # that timm has a name for
    ("base", 32): (256,),
    ("base", 16): (224, 256, 384, 512),
    ("large", 16): (256, 384, 512),
    ("so400m", 14): (224, 378, 384),
    ("so400m", 16): (256, 384, 512),
    ("giantopt", 16): (256, 384),
}


def rules(config: CLIPConfig, custom_text: bool, timm: bool) -> list[Rule]:
    """The table for an architecture.

    Args:
        config: of the model.
        custom_text: the text tower is a module of its own, `text`.
        timm: the image tower is timm's.
    """
    vision = prefixed("trunk.", "", TIMM_TRANSFORMER) if timm else [*VISION_TRANSFORMER, *RESNET]
    text = TEXT_WITH_BIAS if config.text.projection_bias else TEXT
    return [
        *prefixed("visual.", "visual/", vision),
        *prefixed("text." if custom_text else "", "text/", text),
        *SCALARS,
    ]


def read_config(values: Any, where: str) -> tuple[CLIPConfig, Preprocess, TokenizerSpec]:
    """Architecture, preprocessing and tokenizer of an `open_clip_config.json`.

    Raises:
        WeightsError: keys that are missing, or that stand for what this program does not have.
    """
    whole = Reader(values, where)
    model, preprocess = whole.section("model_cfg"), whole.section("preprocess_cfg")
    quick = model.take("quick_gelu", False)
    vision_section, text_section = model.section("vision_cfg"), model.section("text_cfg")
    vision: ViTConfig | ResNetConfig
    if vision_section.take("timm_model_name", ""):
        vision = _timm_config(values["model_cfg"]["vision_cfg"], where)
    else:
        vision = _vision_config(vision_section, quick, where)
    text, tokenizer = _text_config(text_section, quick)
    config = CLIPConfig(
        embed_dim=model.take("embed_dim"),
        vision=vision,
        text=text,
        logit_bias="init_logit_bias" in values["model_cfg"],
    )
    model.refuse(custom_text=..., init_logit_bias=..., init_logit_scale=..., output_dict=...)
    return config, _preprocess(preprocess, vision.image_size), tokenizer


def _activation(section: Reader, quick: bool) -> Activation:
    arguments = section.section("act_kwargs")
    tanh = arguments.take("approximate", "none") == "tanh"
    arguments.refuse()
    return "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"


def _epsilon(section: Reader) -> float:
    arguments = section.section("norm_kwargs")
    epsilon = arguments.take("eps", 1e-5)
    arguments.refuse()
    return epsilon


_POOLS: dict[str, Literal["class", "mean"]] = {"tok": "class", "avg": "mean"}


def _vision_config(section: Reader, quick: bool, where: str) -> ViTConfig | ResNetConfig:
    layers, width = section.take("layers", 12), section.take("width", 768)
    image_size = square(section.take("image_size", 224), where)
    head_width = section.take("head_width", HEAD_WIDTH)
    activation = _activation(section, quick)
    if not isinstance(layers, int):
        section.refuse(patch_size=...)
        return ResNetConfig(image_size, width, tuple(layers), heads=width * 32 // head_width)
    pool = _POOLS.get(section.take("pool_type", "tok"))
    norm_after_pool = section.take("final_ln_after_pool", False)
    if pool is None or (pool == "mean" and not norm_after_pool):
        raise WeightsError(
            f"{where}: this program pools the class token, or the mean before the last norm"
        )
    patch_size = square(section.take("patch_size", 16), where)
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        margin=image_size % patch_size > 0,
        width=width,
        layers=layers,
        heads=width // head_width,
        mlp_ratio=section.take("mlp_ratio", 4.0),
        activation=activation,
        pool=pool,
        pre_norm=not section.take("no_ln_pre", False),
        norm_epsilon=_epsilon(section),
        patch_dropout=section.take("patch_dropout", 0.0),
    )
    section.refuse(
        attentional_pool=False,
        attn_pooler_queries=...,
        attn_pooler_heads=...,
        output_tokens=...,
        pos_embed_type="learnable",
    )
    return config


def _timm_config(values: Mapping[str, Any], where: str) -> ViTConfig:
    section = Reader(values, f"{where}: vision_cfg")
    name = section.take("timm_model_name")
    match = TIMM_NAME.fullmatch(name)
    if not match:
        raise WeightsError(
            f"{where}: of timm's image towers this program knows SigLIP's only, such as "
            f"vit_base_patch16_siglip_224, not {name}"
        )
    width, layers, heads, ratio, activation = TIMM_SIZES[match[1]]
    section.refuse(
        timm_pool="map",
        timm_proj="none",
        timm_model_pretrained=...,
        timm_drop=...,
        timm_drop_path=...,
        image_size=int(match[3]),
    )
    image_size, patch_size = int(match[3]), int(match[2])
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        margin=image_size % patch_size > 0,
        width=width,
        layers=layers,
        heads=heads,
        mlp_ratio=ratio,
        activation=activation,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection=False,
        norm_epsilon=1e-6,
    )


_TEXT_POOLS: dict[str, Literal["eot", "last"]] = {"argmax": "eot", "last": "last"}


def _text_config(section: Reader, quick: bool) -> tuple[TextConfig, TokenizerSpec]:
    pool = section.take("pool_type", "argmax")
    if pool not in _TEXT_POOLS:
        raise WeightsError(f"text_cfg: this program has nothing for pool_type={pool!r}")
    config = TextConfig(
        width=section.take("width", 512),
        heads=section.take("heads", 8),
        layers=section.take("layers", 12),
        context_length=section.take("context_length", 77),
        vocab_size=section.take("vocab_size", 49408),
        mlp_ratio=section.take("mlp_ratio", 4.0),
        activation=_activation(section, quick),
        pool=_TEXT_POOLS[pool],
        causal=not section.take("no_causal_mask", False),
        projection=section.take("proj_type", "linear") != "none",
        projection_bias=section.take("proj_bias", False),
        norm_epsilon=_epsilon(section),
    )
    tokenizer = TokenizerSpec()
    if section.take("hf_tokenizer_name", ""):
        arguments = section.section("tokenizer_kwargs")
        tokenizer = TokenizerSpec(
            "sentencepiece", clean=arguments.take("clean", "whitespace"), pad=1
        )
        arguments.refuse()
    section.refuse(
        embed_cls=False, pad_id=..., eos_id=..., output_tokens=..., final_ln_after_pool=...
    )
    return config, tokenizer


def _preprocess(section: Reader, size: int) -> Preprocess:
    """OpenCLIP's own defaults, OpenAI's transform, where the file says nothing."""
    mean, std = section.take("mean", MEAN), section.take("std", STD)
    resize_mode = section.take("resize_mode", "shortest")
    interpolation = section.take("interpolation", "bicubic")
    section.refuse(mode="RGB", size=..., fill_color=0)
    if resize_mode not in ("shortest", "squash"):
        raise WeightsError(f"preprocess_cfg: no resize_mode {resize_mode!r} here")
    return Preprocess(
        size,
        tuple(mean),
        tuple(std),
        resize_mode,
        # "random" is for training; OpenCLIP evaluates it as bicubic.
        "bilinear" if interpolation == "bilinear" else "bicubic",
    )


def timm_name(vision: ViTConfig) -> str | None:
    """timm's name of a SigLIP image tower, or None where it has none."""
    for (size, patch), resolutions in TIMM_RESOLUTIONS.items():
        width, layers, heads, ratio, _ = TIMM_SIZES[size]
        if (
            (vision.width, vision.layers, vision.heads, vision.patch_size)
            == (width, layers, heads, patch)
            and int(width * vision.mlp_ratio) == int(width * ratio)
            and vision.image_size in resolutions
        ):
            return f"vit_{size}_patch{patch}_siglip_{vision.image_size}"
    return None


def write_config(config: CLIPConfig, preprocess: Preprocess) -> tuple[dict[str, Any], list[Rule]]:
    """An `open_clip_config.json`, and the table that goes with it.

    Raises:
        WeightsError: OpenCLIP has no such architecture; every reason is named.
    """
    vision, text = config.vision, config.text
    siglip = isinstance(vision, ViTConfig) and vision.pool == "map"
    activations = {text.activation, getattr(vision, "activation", text.activation)}
    problems = []
    if "quick_gelu" in activations and len(activations) > 1:
        problems.append("one tower has QuickGELU and the other has not")
    model: dict[str, Any] = {"embed_dim": config.embed_dim}
    if activations == {"quick_gelu"}:
        model["quick_gelu"] = True
    if config.logit_bias:
        model["init_logit_bias"] = -10
    if siglip:
        model["custom_text"] = True
    section, found = _write_vision(vision)
    model |= {"vision_cfg": section, "text_cfg": _write_text(text)}
    if problems + found:
        raise WeightsError("OpenCLIP has no such model: " + "; ".join(problems + found))
    values = {
        "model_cfg": model,
        "preprocess_cfg": {
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize_mode,
        },
    }
    return values, rules(config, custom_text=siglip, timm=siglip)


def _write_vision(vision: ViTConfig | ResNetConfig) -> tuple[dict[str, Any], list[str]]:
    if isinstance(vision, ResNetConfig):
        return {
            "image_size": vision.image_size,
            "layers": list(vision.layers),
            "width": vision.width,
            "head_width": vision.width * 32 // vision.heads,
            "patch_size": None,
        }, []
    if vision.pool == "map":
        return _write_timm(vision)
    problems = []
    if vision.patch_bias:
        problems.append("the patches have a bias")
    if not vision.class_token:
        problems.append("there is no class token")
    if not vision.projection:
        problems.append("the image tower has no projection")
    section = {
        "image_size": vision.image_size,
        "layers": vision.layers,
        "width": vision.width,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": vision.mlp_ratio,
        "patch_size": vision.patch_size,
        "norm_kwargs": {"eps": vision.norm_epsilon},
    }
    if vision.activation == "gelu_tanh":
        section["act_kwargs"] = {"approximate": "tanh"}
    if not vision.pre_norm:
        section["no_ln_pre"] = True
    if vision.pool == "mean":
        section |= {"pool_type": "avg", "final_ln_after_pool": True}
    return section, problems


def _write_timm(vision: ViTConfig) -> tuple[dict[str, Any], list[str]]:
    name = timm_name(vision)
    if name is None:
        return {}, ["timm has no SigLIP image tower of this size"]
    expected = _timm_config({"timm_model_name": name}, "")
    problems = [
        f"timm's {name} has {field}={getattr(expected, field)!r}, not {getattr(vision, field)!r}"
        for field in ("activation", "class_token", "pre_norm", "patch_bias", "norm_epsilon")
        if getattr(expected, field) != getattr(vision, field)
    ]
    section = {
        "image_size": vision.image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return section, problems


def _write_text(text: TextConfig) -> dict[str, Any]:
    section: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": text.mlp_ratio,
        "norm_kwargs": {"eps": text.norm_epsilon},
    }
    if text.activation == "gelu_tanh":
        section["act_kwargs"] = {"approximate": "tanh"}
    if not text.causal:
        section["no_causal_mask"] = True
    if text.pool == "last":
        section["pool_type"] = "last"
    if text.projection_bias:
        section["proj_bias"] = True
    if not text.projection:
        section["proj_type"] = "none"
    return section
