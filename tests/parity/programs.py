"""open_clip's models with random weights, and the same weights in ours."""

import json
import sys
import types

import numpy as np
import pytest
from flax import nnx

from clip_jax.tokenizer import EOT, SOT
from clip_jax.weights import open_clip, openai
from clip_jax.weights.mapping import Tensors, read
from clip_jax.weights.source import abstract_model, entries, nest

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
# torchvision's operators may not match a CPU build of torch; none of them is needed here.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
theirs = pytest.importorskip("open_clip", reason="needs open_clip: pip install -e '.[parity]'")

SMALL_TEXT = {"width": 64, "heads": 1, "layers": 2, "context_length": 9, "vocab_size": 50}
SMALL = {
    "vit": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 128, "layers": 3, "mlp_ratio": 2.0
        },
        "text_cfg": SMALL_TEXT,
    },
    "vit, gelu, wide heads": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 160, "layers": 2, "head_width": 80,
            "mlp_ratio": 4.9231,
        },
        "text_cfg": SMALL_TEXT | {"act_kwargs": {"approximate": "tanh"}},
    },
    "vit, mean pooled": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "pool_type": "avg",
            "final_ln_after_pool": True, "no_ln_pre": True,
        },
        "text_cfg": SMALL_TEXT | {"pool_type": "last", "no_causal_mask": True},
    },
    "resnet": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "width": 16, "layers": [1, 2, 3, 1], "head_width": 64},
        "text_cfg": SMALL_TEXT,
    },
}  # fmt: skip


def perturbed(model):
    """Away from zeros and ones, which hide mistakes; in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.2 * torch.rand_like(buffer))
    return model.eval()


def their_model(config):
    config = json.loads(json.dumps(config))
    torch.manual_seed(0)
    kind = theirs.model.CustomTextCLIP if config.pop("custom_text", False) else theirs.model.CLIP
    return perturbed(kind(**config))


def inputs(config, batch=2):
    """Normalised pictures, and tokens whose end of text is the largest id."""
    random = np.random.default_rng(0)
    size, text = config.vision.image_size, config.text
    images = random.normal(size=(batch, size, size, 3)).astype(np.float32)
    end = EOT if text.vocab_size > EOT else text.vocab_size - 1
    tokens = random.integers(1, min(end, SOT), (batch, text.context_length)).astype(np.int32)
    if text.pool == "eot":
        for row in range(batch):
            at = text.context_length - 1 - 3 * row % (text.context_length - 1)
            tokens[row, at], tokens[row, at + 1 :] = end, 0
    return images, tokens


def relative(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def numpy_state(model):
    """A copy of a torch model's parameters and buffers, by name."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def as_file(arrays):
    """Arrays by name as a file that is open."""
    shapes = {name: array.shape for name, array in arrays.items()}
    return Tensors("a model", shapes, lambda name: arrays[name])


def our_config(config):
    """The architecture that open_clip describes by `config`."""
    return open_clip.read_config({"model_cfg": config, "preprocess_cfg": {}}, "a model")[0]


def our_arrays(config, arrays):
    """open_clip's names and shapes -> ours; for weights and for gradients alike."""
    table = entries(open_clip.rules(config, custom_text=False, timm=False), config)
    return dict(read(table, as_file(arrays), openai.IGNORED))


def built(config, arrays):
    """Our model of arrays by their paths."""
    graphdef, *parts = abstract_model(config)
    params, statistics = (nest({path: arrays[path] for path in part}) for part in parts)
    return nnx.merge(graphdef, params, statistics)
