"""Hugging Face Transformers' names and JSON files: CLIPModel and SiglipModel."""

from collections.abc import Mapping
from typing import Any

from clip_jax.errors import WeightsError
from clip_jax.models import CLIPConfig, TextConfig, ViTConfig
from clip_jax.preprocess import MEAN, STD, Interpolation, Preprocess, ResizeMode
from clip_jax.tokenizer import EOT, SOT, VOCAB_SIZE
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.weights.mapping import Rule, prefixed
from clip_jax.weights.openai import QKV, from_heads, fused, linear, norm
from clip_jax.weights.source import Reader, mlp_ratio, square

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # since version 5, with the former in it
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

BLOCK = [
    *norm("layer_norm1", "ln_1"),
    *fused("self_attn.q_proj", "attention", ("query",), "."),
    *fused("self_attn.k_proj", "attention", ("key",), "."),
    *fused("self_attn.v_proj", "attention", ("value",), "."),
    *from_heads("self_attn.out_proj", "attention/out"),
    *norm("layer_norm2", "ln_2"),
    *linear("mlp.fc1", "mlp/up"),
    *linear("mlp.fc2", "mlp/down"),
]
BLOCKS = prefixed("encoder.layers.{layer}.", "transformer/blocks/", BLOCK)
TEXT = [
    Rule("embeddings.token_embedding.weight", "token_embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    *BLOCKS,
    *norm("final_layer_norm", "ln_final"),
]
VISION = [
    Rule("embeddings.patch_embedding.weight", "patch_embedding/kernel", "d c p q -> (p q c) d"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    *BLOCKS,
    *norm("post_layernorm", "ln_post"),
]
CLIP_RULES = [
    *prefixed("text_model.", "text/", TEXT),
    *prefixed("vision_model.", "visual/", VISION),
    Rule("vision_model.embeddings.class_embedding", "visual/class_embedding"),
    *norm("vision_model.pre_layrnorm", "visual/ln_pre"),  # it is spelled so
    Rule("visual_projection.weight", "visual/projection", "e d -> d e"),
    Rule("text_projection.weight", "text/projection", "e d -> d e"),
    Rule("logit_scale", "logit_scale"),
]
SIGLIP_RULES = [
    *prefixed("text_model.", "text/", TEXT),
    Rule("text_model.head.weight", "text/projection", "e d -> d e"),
    Rule("text_model.head.bias", "text/projection_bias"),
    *prefixed("vision_model.", "visual/", VISION),
    Rule("vision_model.embeddings.patch_embedding.bias", "visual/patch_embedding/bias"),
    Rule("vision_model.head.probe", "visual/pool/probe", "1 1 d -> d"),
    *fused("vision_model.head.attention.in_proj", "visual/pool/attention", QKV),
    *from_heads("vision_model.head.attention.out_proj", "visual/pool/attention/out"),
    *norm("vision_model.head.layernorm", "visual/pool/ln"),
    *linear("vision_model.head.mlp.fc1", "visual/pool/mlp/up"),
    *linear("vision_model.head.mlp.fc2", "visual/pool/mlp/down"),
    Rule("logit_scale", "logit_scale", "1 ->"),
    Rule("logit_bias", "logit_bias", "1 ->"),
]
RULES = {"clip": CLIP_RULES, "siglip": SIGLIP_RULES}
IGNORED = (r".*\.position_ids",)  # a buffer that older versions saved

# A config.json leaves out what is as Transformers has it by default.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    },
    "siglip": {
        "text_config": {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
    },
}
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_config(values: Any, where: str) -> tuple[CLIPConfig, str]:
    """The architecture of a `config.json`, and its model type, a key of `RULES`.

    Raises:
        WeightsError: another kind of model, or a value that this program has nothing for.
    """
    whole = Reader(values, where)
    kind = whole.take("model_type", "unknown")
    if kind not in RULES:
        raise WeightsError(
            f"{where}: expected model_type clip or siglip, found {kind!r}; this program has no "
            "other of Transformers' models"
        )
    text, vision = (_section(values, kind, name, where) for name in DEFAULTS[kind])
    siglip = kind == "siglip"

    def common(section: Mapping[str, Any], name: str) -> dict[str, Any]:
        if section["hidden_act"] not in ACTIVATIONS:
            raise WeightsError(
                f"{where}: {name} has hidden_act={section['hidden_act']!r}; "
                f"known: {', '.join(ACTIVATIONS)}"
            )
        width = section["hidden_size"]
        return {
            "width": width,
            "layers": section["num_hidden_layers"],
            "heads": section["num_attention_heads"],
            "mlp_ratio": mlp_ratio(width, section["intermediate_size"]),
            "activation": ACTIVATIONS[section["hidden_act"]],
            "norm_epsilon": section["layer_norm_eps"],
        }

    image_size, patch_size = (square(vision[key], where) for key in ("image_size", "patch_size"))
    vision_config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        margin=image_size % patch_size > 0,
        **common(vision, "vision_config"),
        **_SIGLIP_VISION if siglip else {},
    )
    text_config = TextConfig(
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        **common(text, "text_config"),
        **_SIGLIP_TEXT if siglip else {},
    )
    if siglip:
        embed_dim = text.get("projection_size", text_config.width)
    else:
        embed_dim = whole.take("projection_dim", 512)
    return CLIPConfig(embed_dim, vision_config, text_config, logit_bias=siglip), kind


_SIGLIP_VISION: dict[str, Any] = {
    "pool": "map",
    "class_token": False,
    "pre_norm": False,
    "patch_bias": True,
    "projection": False,
}
_SIGLIP_TEXT: dict[str, Any] = {"pool": "last", "causal": False, "projection_bias": True}


def _section(values: Mapping[str, Any], kind: str, name: str, where: str) -> dict[str, Any]:
    defaults = DEFAULTS[kind][name]
    found = values.get(name) or {}
    # Files of before version 4.27 hold the section twice, and Transformers believes this one.
    found = values.get(f"{name}_dict") or found
    if not isinstance(found, Mapping):
        raise WeightsError(f"{where}: {name} is no object: {found!r}")
    if not found.get("vision_use_head", True):
        raise WeightsError(f"{where}: an image tower without its attention pool embeds nothing")
    return defaults | {key: value for key, value in found.items() if value is not None}


def read_preprocess(values: Any, where: str, size: int, kind: str) -> Preprocess:
    """The transform of a `preprocessor_config.json`, for a model of images of `size` pixels.

    Raises:
        WeightsError: a transform that `Preprocess` is not.
    """
    section = Reader(values, where)
    default = default_preprocess(size, kind)
    mean = tuple(section.take("image_mean", list(default.mean)))
    std = tuple(section.take("image_std", list(default.std)))
    resample = section.take("resample", 3)
    if resample not in FILTERS:
        raise WeightsError(f"{where}: resample={resample}; known: 2 (bilinear) and 3 (bicubic)")
    resized = section.take("size", {"height": size, "width": size} if kind == "siglip" else size)
    crops = section.take("do_center_crop", kind == "clip")
    sides = resized if isinstance(resized, Mapping) else {"shortest_edge": resized}
    squash = set(sides) == {"height", "width"}
    cropped = section.take("crop_size", size)
    cropped = set(cropped.values()) if isinstance(cropped, Mapping) else {cropped}
    if (
        set(sides.values()) != {size}
        or (crops and cropped != {size})
        or not (squash or crops)
        or not section.take("do_resize", True)
    ):
        raise WeightsError(
            f"{where}: expected pictures brought to {size} pixels, by the short side and a centre "
            f"crop or by both sides, found size={resized!r}, "
            f"crop_size={cropped if crops else None!r}"
        )
    mode: ResizeMode = "squash" if squash else "shortest"
    return Preprocess(size, mean, std, mode, FILTERS[resample])


def default_preprocess(size: int, kind: str) -> Preprocess:
    """What Transformers does for a model type when no file says otherwise."""
    if kind == "siglip":
        half = (0.5, 0.5, 0.5)
        return Preprocess(size, half, half, "squash", "bicubic")
    return Preprocess(size, MEAN, STD)


def read_tokenizer(kind: str, config: CLIPConfig, file: str | None) -> TokenizerSpec:
    """The tokenizer that belongs to a model type."""
    if kind == "clip":
        return TokenizerSpec()
    return TokenizerSpec.siglip(config.text.vocab_size, "canonicalize", file)


def write_config(config: CLIPConfig) -> tuple[dict[str, Any], str]:
    """A `config.json`, and the model type.

    Raises:
        WeightsError: Transformers has no such architecture; every reason is named.
    """
    vision = config.vision
    if not isinstance(vision, ViTConfig):
        raise WeightsError(
            "Transformers has no CLIP with a ResNet; convert it --to=open_clip instead"
        )
    kind = "siglip" if config.logit_bias or vision.pool == "map" else "clip"
    # What the sections cannot say must be as Transformers has it.
    siglip = kind == "siglip"
    plain = ViTConfig(image_size=0, patch_size=0, width=0, layers=0, heads=0)
    plain_text = TextConfig(width=0, heads=0)
    expected = {
        f"vision.{field}": _SIGLIP_VISION[field] if siglip else getattr(plain, field)
        for field in _SIGLIP_VISION
    } | {
        f"text.{field}": _SIGLIP_TEXT[field] if siglip else getattr(plain_text, field)
        for field in _SIGLIP_TEXT
    }
    expected |= {"text.projection": True, "logit_bias": siglip}
    if siglip:
        expected["embed_dim"] = vision.width

    def value(path: str) -> Any:
        part, _, field = path.rpartition(".")
        return getattr(getattr(config, part) if part else config, field)

    problems = [
        f"{path} is {value(path)!r}, in its {kind} model {wanted!r}"
        for path, wanted in expected.items()
        if value(path) != wanted
    ]
    if problems:
        raise WeightsError("Transformers has no such model: " + "; ".join(problems))
    return _write_sections(config, vision, kind), kind


def _write_sections(config: CLIPConfig, vision: ViTConfig, kind: str) -> dict[str, Any]:
    text = config.text
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

    def common(tower: ViTConfig | TextConfig) -> dict[str, Any]:
        return {
            "hidden_size": tower.width,
            "intermediate_size": int(tower.width * tower.mlp_ratio),
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": names[tower.activation],
            "layer_norm_eps": tower.norm_epsilon,
        }

    sections: dict[str, Any] = {
        "text_config": common(text)
        | {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length},
        "vision_config": common(vision)
        | {"image_size": vision.image_size, "patch_size": vision.patch_size},
    }
    for name, section in sections.items():
        section["model_type"] = f"{kind}_{name.removesuffix('_config')}_model"
    if kind == "siglip":
        sections["text_config"] |= {
            "projection_size": config.embed_dim,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        return {"architectures": ["SiglipModel"], "model_type": kind, "dtype": "float32"} | sections
    # End of text is read where its id is; by Transformers' rule, 2 stands for the largest id.
    clips = text.vocab_size == VOCAB_SIZE
    sections["text_config"] |= {
        "bos_token_id": SOT if clips else None,
        "eos_token_id": EOT if clips else 2,
        "pad_token_id": EOT if clips else None,
        "projection_dim": config.embed_dim,
    }
    sections["vision_config"]["projection_dim"] = config.embed_dim
    return {
        "architectures": ["CLIPModel"],
        "model_type": kind,
        "projection_dim": config.embed_dim,
        "dtype": "float32",
    } | sections


def write_preprocess(preprocess: Preprocess, kind: str) -> dict[str, Any]:
    """A `preprocessor_config.json`."""
    size = preprocess.size
    number = {name: number for number, name in FILTERS.items()}[preprocess.interpolation]
    values: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor"
        if kind == "siglip"
        else "CLIPImageProcessor",
        "processor_class": "SiglipProcessor" if kind == "siglip" else "CLIPProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": number,
        "rescale_factor": 1 / 255,
        "do_center_crop": preprocess.resize_mode == "shortest",
    }
    square_size = {"height": size, "width": size}
    if preprocess.resize_mode == "shortest":
        return values | {"size": {"shortest_edge": size}, "crop_size": square_size}
    return values | {"size": square_size}
