"""The towers against open_clip's with the same weights, in float32: embeddings and gradients."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.losses import softmax_loss
from clip_jax.models import CLIP, CLIPConfig, TextConfig, ViTConfig, model_config
from clip_jax.tokenizer import EOT, SOT

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
# torchvision's operators may not match a CPU build of torch; none of them is needed here.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install -e '.[parity]'")

SMALL = CLIPConfig(
    embed_dim=48,
    vision=ViTConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2),
    text=TextConfig(width=64, heads=1, layers=2, context_length=77),
)
CONFIGS = {"small": SMALL, "ViT-B/32": model_config("ViT-B/32")}


def their_model(config):
    torch.manual_seed(0)
    vision, text = config.vision, config.text
    model = open_clip.model.CLIP(
        embed_dim=config.embed_dim,
        vision_cfg={
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
        },
        text_cfg={
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
        quick_gelu=True,
    )
    with torch.no_grad():  # away from zeros and ones, which hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def our_tree(tensors, config):
    """open_clip's names and shapes -> ours; for weights and for gradients alike."""

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def blocks(prefix, layers, heads):
        def block(i):
            name = f"{prefix}.resblocks.{i}"
            width = tensors[f"{name}.ln_1.weight"].shape[0]
            split = (heads, width // heads)
            weights = np.split(tensors[f"{name}.attn.in_proj_weight"], 3)
            biases = np.split(tensors[f"{name}.attn.in_proj_bias"], 3)
            attention = {
                part: {"kernel": weight.T.reshape(width, *split), "bias": bias.reshape(split)}
                for part, weight, bias in zip(
                    ("query", "key", "value"), weights, biases, strict=True
                )
            }
            attention["out"] = {
                "kernel": tensors[f"{name}.attn.out_proj.weight"].T.reshape(*split, width),
                "bias": tensors[f"{name}.attn.out_proj.bias"],
            }
            mlp = {
                ours: {
                    "kernel": tensors[f"{name}.mlp.{theirs}.weight"].T,
                    "bias": tensors[f"{name}.mlp.{theirs}.bias"],
                }
                for ours, theirs in (("up", "c_fc"), ("down", "c_proj"))
            }
            return {
                "ln_1": norm(f"{name}.ln_1"),
                "ln_2": norm(f"{name}.ln_2"),
                "attention": attention,
                "mlp": mlp,
            }

        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, range(layers)))
        return {"blocks": stacked}

    vision, text = config.vision, config.text
    kernel = tensors["visual.conv1.weight"].transpose(2, 3, 1, 0)  # D C p q -> p q C D
    return {
        "visual": {
            "patch_embedding": {"kernel": kernel.reshape(-1, vision.width)},
            "class_embedding": tensors["visual.class_embedding"],
            "position_embedding": tensors["visual.positional_embedding"],
            "ln_pre": norm("visual.ln_pre"),
            "transformer": blocks("visual.transformer", vision.layers, vision.heads),
            "ln_post": norm("visual.ln_post"),
            "projection": tensors["visual.proj"],
        },
        "text": {
            "token_embedding": tensors["token_embedding.weight"],
            "position_embedding": tensors["positional_embedding"],
            "transformer": blocks("transformer", text.layers, text.heads),
            "ln_final": norm("ln_final"),
            "projection": tensors["text_projection"],
        },
        "logit_scale": tensors["logit_scale"],
    }


def relative(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_loss_and_every_gradient_equal_open_clips(name):
    config = CONFIGS[name]
    theirs = their_model(config)
    random = np.random.default_rng(0)
    size = config.vision.image_size
    images = random.normal(size=(6, size, size, 3)).astype(np.float32)
    tokens = random.integers(1, SOT, (6, 77)).astype(np.int32)
    tokens[:, 0] = SOT
    for row, end in enumerate((3, 10, 20, 40, 60, 76)):
        tokens[row, end], tokens[row, end + 1 :] = EOT, 0

    image = theirs.encode_image(torch.tensor(images.transpose(0, 3, 1, 2)), normalize=True)
    text = theirs.encode_text(torch.tensor(tokens, dtype=torch.long), normalize=True)
    logits = theirs.logit_scale.exp() * image @ text.T
    labels = torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    loss.backward()

    named = dict(theirs.named_parameters())
    weights = our_tree({k: v.detach().numpy() for k, v in named.items()}, config)
    gradients = our_tree({k: v.grad.numpy() for k, v in named.items()}, config)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))))

    def our_loss(params):
        model = nnx.merge(graphdef, params)
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens, normalize=True)
        return softmax_loss(image, text, jnp.exp(model.logit_scale[...])), (image, text)

    with jax.default_matmul_precision("highest"):
        (our_value, (our_image, our_text)), our_gradients = jax.jit(
            jax.value_and_grad(our_loss, has_aux=True)
        )(weights)

    assert relative(our_image, image.detach().numpy()) < 1e-5
    assert relative(our_text, text.detach().numpy()) < 1e-5
    assert relative(our_value, loss.item()) < 1e-5
    found = jax.tree_util.tree_leaves_with_path(our_gradients)
    for (path, leaf), expected in zip(found, jax.tree.leaves(gradients), strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if where.endswith("key/bias"):
            continue  # softmax ignores it: both gradients are rounding noise
        assert relative(leaf, expected) < 2e-4, where
