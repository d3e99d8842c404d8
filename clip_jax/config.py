"""The configuration of a run: every key there is, its default, and what it means.

A recipe (`configs/*.py`) starts from `default_config` and changes what it must; the command line
changes single keys: `--config.optim.peak_lr=1e-3`. A key that is not here is an error.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from absl import flags
from ml_collections import ConfigDict, config_dict

from clip_jax.errors import ConfigError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, ViTConfig, model_config
from clip_jax.preprocess import MEAN, STD


def _overrides(*architectures: type) -> dict[str, Any]:
    """A placeholder for each field of an architecture: None stands for the named model's value.

    The tower's kind is no field to set: it is the named model's.
    """
    types: dict[str, set[type]] = {}
    for field in (field for each in architectures for field in dataclasses.fields(each)):
        kind = field.type if isinstance(field.type, type) else str
        types.setdefault(field.name, set()).add(kind)
    return {
        name: config_dict.placeholder(kinds.pop() if len(kinds) == 1 else object)
        for name, kinds in types.items()
        if name != "tower"
    }


def default_config() -> ConfigDict:
    """The paper's settings for its ViTs wherever the paper gives one; sizes in steps and pairs."""
    return ConfigDict(
        {
            "seed": 0,  # of the initial parameters, the data order and the augmentation
            "model": {
                "name": "ViT-B/32",  # one of clip_jax.available_models()
                "embed_dim": config_dict.placeholder(int),  # None: as the named model has it
                # None, likewise; the fields of `models.ViTConfig` or `models.ResNetConfig`, and
                # of `models.TextConfig`.
                "vision": _overrides(ViTConfig, ResNetConfig),
                "text": _overrides(TextConfig),
                "logit_bias": config_dict.placeholder(bool),
            },
            "data": {
                # Shards (.tar, TFRecord), a table (.csv, .tsv, .jsonl), a folder, tfds:NAME:SPLIT;
                # or [(spec, weight), ...], a mixture. See clip_jax/data/sources.py.
                "train": config_dict.placeholder(object),
                "data_dir": config_dict.placeholder(str),  # of TFDS; None: TFDS's own default
                # Where a record has its picture; None: where the format has it by custom.
                "image_field": config_dict.placeholder(str),
                # Where it has its caption: a field, or {field: probability} to choose from.
                "captions": config_dict.placeholder(object),
                "templates": ("a photo of a {}.",),  # captions from labels, where there are none
                "streams": 8,  # the order's units: fixed, so that it does not depend on hosts
                "shuffle_bytes": 1 << 30,  # of compressed records, of all streams together
                "max_bad": 0.05,  # share of bad records, or shards, at which the run stops
                "max_pixels": 89_478_485,  # of a picture, by its header; Pillow's own limit
                # Sides of the random square crop, as shares of the largest square; (1, 1) is the
                # paper's crop: short side to size, then a random square.
                "crop": (1.0, 1.0),
                # Instead of it, OpenCLIP's random resized crop: bounds of the area, as shares of
                # the picture's (its default is (0.9, 1.0)), and of width by height.
                "resized_crop": config_dict.placeholder(tuple),
                "crop_ratio": (3 / 4, 4 / 3),
                # Strengths of brightness, contrast, saturation and hue, as in torchvision.
                "color_jitter": (0.0, 0.0, 0.0, 0.0),
                "color_jitter_prob": 0.8,
                "gray_prob": 0.0,
                # Where crops are resized: on the "host"; on the "device", in the train step, so
                # that the host only decodes (docs/data.md); or "auto": on accelerators.
                "resize": "auto",
                # Of the pixels in [0, 1], by channel; the default is CLIP's.
                "mean": MEAN,
                "std": STD,
            },
            "train": {
                "steps": 390_625,  # 32 epochs of 400M pairs in batches of 32,768
                "batch_size": 32_768,  # of all devices together
                "dtype": "bfloat16",  # of compute; parameters and optimizer state are float32
                # What the backward pass recomputes: none, dots, dots_no_hidden, full; or "auto",
                # the first of these from dots on whose memory fits the devices.
                "remat": "dots",
                "unroll": 1,  # layers in one turn of their loop; more is faster on CPUs and GPUs
                "loss": "softmax",  # CLIP's; or SigLIP's "sigmoid", with model.logit_bias=True
                # How a device meets the others' embeddings: "gather" holds all of them, "ring" two
                # devices' and is slower.
                "loss_communication": "gather",
                "accumulate": 1,  # microbatches; the gradient is that of the whole batch, exactly
                "max_logit_scale": 100.0,
                "init_from": config_dict.placeholder(str),  # weights: what clip_jax.load takes
            },
            "optim": {
                "name": "adamw",  # adamw, lion, muon, adafactor
                "peak_lr": 5e-4,
                "warmup_steps": 2_000,
                "beta1": 0.9,
                "beta2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.2,  # decoupled; of all but gains and biases
                "clip_norm": config_dict.placeholder(float),  # of all gradients together
                "layer_decay": 1.0,  # of the learning rate, from each layer to the one below
                "ema_decay": 0.0,  # above 0: averages the weights, and evaluates the averages
                # The paper's ways to save memory; both are rounded stochastically.
                "moment_dtype": "float32",  # or bfloat16
                "bfloat16_weights": (),  # patterns as below: ("^text/",) is the paper's
                # Regular expressions; parameters in whose path one is found stay as they are:
                # ("^visual/",) is LiT. BatchNorm among them keeps its running statistics.
                "frozen": (),
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: all devices that are left
            "checkpoint": {"every": 1_000, "keep": 3},
            "eval": {
                "every": 5_000,  # 0: only at the end
                "datasets": (),  # names that `python -m clip_jax.eval --dataset` takes
                "batch_size": 1_024,
            },
            "log": {"every": 50},
        }
    )


def architecture(config: ConfigDict) -> CLIPConfig:
    """The `model` section as an architecture: the named model, changed where a value is given.

    Raises:
        ConfigError: no model of that name, a field that its towers do not have, or a value that
            is none of the choices.
    """
    base = model_config(config.name)

    def changed(tower: Any, part: str) -> Any:
        given = {key: value for key, value in config[part].items() if value is not None}
        types = {field.name: field.type for field in dataclasses.fields(tower)}
        for key, value in given.items():
            if key not in types:
                raise ConfigError(
                    f"model.{part}.{key}: {config.name} has no such field, only {', '.join(types)}"
                )
            choices = get_args(types[key])
            if get_origin(types[key]) is Literal and value not in choices:
                raise ConfigError(
                    f"model.{part}.{key}={value!r}: choose one of {', '.join(choices)}"
                )
        return dataclasses.replace(tower, **given)

    return CLIPConfig(
        embed_dim=base.embed_dim if config.embed_dim is None else config.embed_dim,
        vision=changed(base.vision, "vision"),
        text=changed(base.text, "text"),
        logit_bias=base.logit_bias if config.logit_bias is None else config.logit_bias,
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=parse_flags)`: a mistake ends in one plain message.

    A mistyped `--config` key is answered with the keys that exist there. Exits with status 2.
    """
    try:
        positional = flags.FLAGS(argv)
        if not flags.FLAGS.is_parsed() or len(positional) > 1:
            raise flags.Error(f"unexpected arguments: {' '.join(positional[1:])}")
        if flags.FLAGS["config"].value is None:
            raise flags.Error("--config=FILE is missing, such as --config=configs/quickstart.py")
        flags.FLAGS.config.to_dict()  # a file that cannot be read shows on the first use
        return positional
    except (AttributeError, KeyError) as error:
        message = _explain_unknown_key(argv) or str(error)
    except (flags.Error, OSError, TypeError, ValueError, ImportError, SyntaxError) as error:
        message = str(error)
    sys.exit(_fail(message))


def _fail(message: str) -> int:
    print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    return 2


def _explain_unknown_key(argv: Sequence[str]) -> str | None:
    """Finds the first override that names no key, and says which keys there are."""
    overrides = [arg.lstrip("-") for arg in argv if arg.lstrip("-").startswith("config.")]
    flags.FLAGS.unparse_flags()
    # ml_collections looks for overrides in sys.argv itself, so that is where they must go.
    sys.argv = [arg for arg in argv if arg.lstrip("-") not in overrides]
    flags.FLAGS(sys.argv)
    for override in overrides:
        name = override.partition("=")[0]
        section, path = flags.FLAGS.config, "config"
        for key in name.split(".")[1:]:
            if not isinstance(section, ConfigDict) or key not in section:
                keys = ", ".join(section.keys()) if isinstance(section, ConfigDict) else "none"
                return f"--{name}: {path} has no key {key!r}; its keys: {keys}"
            section, path = section[key], f"{path}.{key}"
    return None
