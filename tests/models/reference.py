"""The transformer towers in float64 NumPy, loop by loop, from the papers and released code."""

import math

import jax
import numpy as np
from flax import nnx

from clip_jax.tokenizer import EOT

ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


class Reference:
    """Takes the weights of a `CLIP` whose image tower is a ViT."""

    def __init__(self, model):
        self.config = model.config
        self.params = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @staticmethod
    def layer_norm(x, p, epsilon):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]

    @staticmethod
    def attention(x, p, causal=False, queries=None):
        queries = x if queries is None else queries
        _, heads, head_width = p["query"]["kernel"].shape
        out = np.zeros(queries.shape) + p["out"]["bias"]
        for b in range(len(x)):
            for h in range(heads):
                q, k, v = (
                    tokens[b] @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                    for name, tokens in (("query", queries), ("key", x), ("value", x))
                )
                scores = q @ k.T / np.sqrt(head_width)
                if causal:
                    scores[np.triu_indices(len(k), 1)] = -np.inf
                weights = np.exp(scores - scores.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                out[b] += weights @ v @ p["out"]["kernel"][h]
        return out

    @staticmethod
    def mlp(x, p, activation):
        hidden = ACTIVATIONS[activation](x @ p["up"]["kernel"] + p["up"]["bias"])
        return hidden @ p["down"]["kernel"] + p["down"]["bias"]

    def transformer(self, x, stacked, config, causal):
        """The states before, between and after the blocks."""
        states = [x]
        for layer in range(config.layers):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            normed = self.layer_norm(x, p["ln_1"], config.norm_epsilon)
            x = x + self.attention(normed, p["attention"], causal)
            normed = self.layer_norm(x, p["ln_2"], config.norm_epsilon)
            x = x + self.mlp(normed, p["mlp"], config.activation)
            states.append(x)
        return states

    def image_states(self, images):
        p, config = self.params["visual"], self.config.vision
        size = config.patch_size
        kernel = p["patch_embedding"]["kernel"].reshape(size, size, 3, -1)
        embedded = []
        for image in np.float64(images):
            sequence = [p["class_embedding"]] if config.class_token else []
            for top in range(0, image.shape[0], size):
                for left in range(0, image.shape[1], size):
                    patch = image[top : top + size, left : left + size]
                    bias = p["patch_embedding"].get("bias", 0)
                    sequence.append(np.einsum("hwc,hwcd->d", patch, kernel) + bias)
            embedded.append(np.stack(sequence) + p["position_embedding"])
        x = np.stack(embedded)
        if config.pre_norm:
            x = self.layer_norm(x, p["ln_pre"], config.norm_epsilon)
        return self.transformer(x, p["transformer"]["blocks"], config, causal=False)

    def image(self, images):
        p, config = self.params["visual"], self.config.vision
        x, epsilon = self.image_states(images)[-1], config.norm_epsilon
        if config.pool == "class":
            x = self.layer_norm(x[:, 0], p["ln_post"], epsilon)
        elif config.pool == "mean":
            patches = x[:, 1:] if config.class_token else x
            x = self.layer_norm(patches.mean(1), p["ln_post"], epsilon)
        else:
            x, pool = self.layer_norm(x, p["ln_post"], epsilon), p["pool"]
            probe = np.broadcast_to(pool["probe"], (len(x), 1, x.shape[2]))
            x = self.attention(x, pool["attention"], queries=probe)
            x = x + self.mlp(
                self.layer_norm(x, pool["ln"], epsilon), pool["mlp"], config.activation
            )
            x = x[:, 0]
        return x @ p["projection"] if config.projection else x

    def text_states(self, tokens):
        p, config = self.params["text"], self.config.text
        x = p["token_embedding"][np.asarray(tokens)] + p["position_embedding"]
        return self.transformer(x, p["transformer"]["blocks"], config, config.causal)

    def text(self, tokens):
        p, config = self.params["text"], self.config.text
        x = self.layer_norm(self.text_states(tokens)[-1], p["ln_final"], config.norm_epsilon)
        if config.pool == "last":
            x = x[:, -1]
        else:
            ends = [list(row).index(EOT) for row in np.asarray(tokens)]
            x = np.stack([x[b, end] for b, end in enumerate(ends)])
        x = x @ p["projection"] if config.projection else x
        return x + p.get("projection_bias", 0)
