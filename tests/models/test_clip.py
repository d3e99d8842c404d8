"""The towers: exact sizes, an independent NumPy implementation, and what must not matter."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.errors import ConfigError
from clip_jax.models import CLIP, CLIPConfig, TextConfig, ViTConfig, available_models, model_config
from clip_jax.models.positions import resize_position_embedding
from clip_jax.tokenizer import EOT, SOT

TINY = CLIPConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=16, patch_size=4, width=32, layers=3, heads=4),
    text=TextConfig(width=16, heads=2, layers=2, context_length=12),
)


def tiny_model(config=TINY, seed=0, **kwargs):
    model = CLIP(config, rngs=nnx.Rngs(seed), **kwargs)
    # Biases and gains start at zero and one, which would hide mistakes: move everything.
    leaves, structure = jax.tree.flatten(nnx.state(model))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(structure, moved))
    return model


def images(count=3, size=16):
    return jax.random.normal(jax.random.key(7), (count, size, size, 3))


def tokens():
    return jnp.array(
        [
            [SOT, 320, 1125, 539, 320, 1929, EOT, 0, 0, 0, 0, 0],
            [SOT, 320, 2368, EOT, 0, 0, 0, 0, 0, 0, 0, 0],
            [SOT, *range(400, 410), EOT],
        ]
    )


# The paper's table of parameters: image tower, text tower, all with logit_scale.
PARAMETERS = {
    "ViT-B/32": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B/16": (86_192_640, 63_428_096, 149_620_737),
    "ViT-L/14": (303_966_208, 123_650_304, 427_616_513),
    "ViT-L/14@336px": (304_293_888, 123_650_304, 427_944_193),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_shapes_are_the_papers(name):
    config = model_config(name)

    def count(module):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    model = nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0)))
    assert (count(model.visual), count(model.text), count(model)) == PARAMETERS[name]

    size = config.vision.image_size
    image, text = jax.eval_shape(
        lambda model, image, text: (model.encode_image(image), model.encode_text(text)),
        model,
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((5, 77), jnp.int32),
    )
    assert image.shape == (2, config.embed_dim)
    assert text.shape == (5, config.embed_dim)


def test_every_named_model_is_available_and_an_unknown_one_lists_them():
    assert set(PARAMETERS) < set(available_models())
    with pytest.raises(ConfigError, match=r"did you mean 'ViT-B/32'\?.*ViT-L/14@336px"):
        model_config("ViT-B-32")


class Reference:
    """CLIP's forward pass in float64 NumPy, loop by loop, from the paper and the released code."""

    def __init__(self, model):
        self.config = model.config
        self.params = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @staticmethod
    def layer_norm(x, p):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]

    @staticmethod
    def attention(x, p, causal):
        batch, length, _ = x.shape
        _, heads, head_width = p["query"]["kernel"].shape
        out = np.zeros_like(x) + p["out"]["bias"]
        for b in range(batch):
            for h in range(heads):
                q, k, v = (
                    x[b] @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                    for name in ("query", "key", "value")
                )
                scores = q @ k.T / np.sqrt(head_width)
                if causal:
                    scores[np.triu_indices(length, 1)] = -np.inf
                weights = np.exp(scores - scores.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                out[b] += weights @ v @ p["out"]["kernel"][h]
        return out

    def transformer(self, x, stacked, causal):
        layers = stacked["ln_1"]["scale"].shape[0]
        for layer in range(layers):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            x = x + self.attention(self.layer_norm(x, p["ln_1"]), p["attention"], causal)
            hidden = (
                self.layer_norm(x, p["ln_2"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
            )
            hidden = hidden / (1 + np.exp(-1.702 * hidden))
            x = x + hidden @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
        return x

    def image(self, images):
        p, size = self.params["visual"], self.config.vision.patch_size
        kernel = p["patch_embedding"]["kernel"].reshape(size, size, 3, -1)
        embedded = []
        for image in np.float64(images):
            sequence = [p["class_embedding"]]
            for top in range(0, image.shape[0], size):
                for left in range(0, image.shape[1], size):
                    patch = image[top : top + size, left : left + size]
                    sequence.append(np.einsum("hwc,hwcd->d", patch, kernel))
            embedded.append(np.stack(sequence) + p["position_embedding"])
        x = self.layer_norm(np.stack(embedded), p["ln_pre"])
        x = self.transformer(x, p["transformer"]["blocks"], causal=False)
        return self.layer_norm(x[:, 0], p["ln_post"]) @ p["projection"]

    def text(self, tokens):
        p = self.params["text"]
        x = p["token_embedding"][np.asarray(tokens)] + p["position_embedding"]
        x = self.transformer(x, p["transformer"]["blocks"], causal=True)
        x = self.layer_norm(x, p["ln_final"])
        ends = [list(row).index(EOT) for row in np.asarray(tokens)]
        return np.stack([x[b, end] for b, end in enumerate(ends)]) @ p["projection"]


def test_towers_equal_the_numpy_reference():
    model = tiny_model()
    reference = Reference(model)
    with jax.default_matmul_precision("highest"):
        found_image, found_text = model.encode_image(images()), model.encode_text(tokens())
        per_image, per_text = model(images(), tokens())
    expected_image, expected_text = reference.image(images()), reference.text(tokens())
    np.testing.assert_allclose(found_image, expected_image, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_text, expected_text, rtol=1e-5, atol=1e-5)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (expected_image, expected_text)]
    logits = np.exp(float(model.logit_scale[...])) * unit[0] @ unit[1].T
    np.testing.assert_allclose(per_image, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(per_text, logits.T, rtol=1e-4, atol=1e-4)


def test_what_follows_the_end_of_text_and_how_much_padding_does_not_matter():
    model = tiny_model()
    full = model.encode_text(tokens())
    dirty = tokens().at[0, 8].set(5).at[1, 6].set(999)  # smaller ids than EOT
    np.testing.assert_allclose(model.encode_text(dirty), full, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(tokens()[:2, :7]), full[:2], atol=1e-6)


def test_rows_do_not_influence_each_other():
    model = tiny_model()
    np.testing.assert_allclose(
        model.encode_image(images())[1:2], model.encode_image(images()[1:2]), atol=1e-6
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    def gradients(remat):
        model = tiny_model(remat=remat)
        return jax.grad(lambda m: jnp.sum(m(images(), tokens())[0] ** 2))(model)

    expected, found = nnx.state(gradients("none")), nnx.state(gradients(remat))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), expected, found
    )


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    exact, half = tiny_model(), tiny_model(dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(half, nnx.Param)))
    assert half.encode_image(images()).dtype == jnp.bfloat16
    logits = half(images(), tokens())[0]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact(images(), tokens())[0], atol=0.3)


def test_initial_weights_follow_the_released_code():
    config = model_config("ViT-B/32")
    small = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=2),
        text=dataclasses.replace(config.text, layers=2, vocab_size=4096),
    )
    params = nnx.to_pure_dict(nnx.state(CLIP(small, rngs=nnx.Rngs(0)), nnx.Param))
    text, visual = params["text"], params["visual"]
    text_blocks, visual_blocks = text["transformer"]["blocks"], visual["transformer"]["blocks"]

    def std(x):
        return float(jnp.std(x))

    residual = 512**-0.5 * (2 * 2) ** -0.5  # two layers
    uniform = 3**-0.5  # the deviation of U(-1, 1)
    expected = {
        "token embedding": (std(text["token_embedding"]), 0.02),
        "text position": (std(text["position_embedding"]), 0.01),
        "text query": (std(text_blocks["attention"]["query"]["kernel"]), 512**-0.5),
        "text attention out": (std(text_blocks["attention"]["out"]["kernel"]), residual),
        "text up": (std(text_blocks["mlp"]["up"]["kernel"]), (2 * 512) ** -0.5),
        "text up bias": (std(text_blocks["mlp"]["up"]["bias"]), uniform * 512**-0.5),
        "text down": (std(text_blocks["mlp"]["down"]["kernel"]), residual),
        "text projection": (std(text["projection"]), 512**-0.5),
        "class embedding": (std(visual["class_embedding"]), 768**-0.5),
        "image position": (std(visual["position_embedding"]), 768**-0.5),
        "image projection": (std(visual["projection"]), 768**-0.5),
        "patch embedding": (std(visual["patch_embedding"]["kernel"]), uniform * 3072**-0.5),
        "image query": (
            std(visual_blocks["attention"]["query"]["kernel"]),
            uniform * (6 / (4 * 768)) ** 0.5,
        ),
        "image down": (std(visual_blocks["mlp"]["down"]["kernel"]), uniform * 3072**-0.5),
    }
    for name, (found, wanted) in expected.items():
        assert found == pytest.approx(wanted, rel=0.08), name
    assert not np.any(visual_blocks["attention"]["query"]["bias"])
    assert float(params["logit_scale"]) == pytest.approx(math.log(1 / 0.07))


def test_images_of_another_size_and_texts_too_long_are_refused_with_both_sizes():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"\[B, 16, 16, 3\], got \(3, 20, 20, 3\)"):
        model.encode_image(images(size=20))
    with pytest.raises(ValueError, match="at most 12 tokens a text, got 13"):
        model.encode_text(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision", {"patch_size": 5}, "patches of 5 pixels do not divide an image of 16"),
        ("vision", {"heads": 5}, "5 heads do not divide the width 32"),
        ("text", {"heads": 3}, "3 heads do not divide the width 16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(part, change, message):
    config = dataclasses.replace(TINY, **{part: dataclasses.replace(getattr(TINY, part), **change)})
    with pytest.raises(ConfigError, match=message):
        CLIP(config, rngs=nnx.Rngs(0))


def test_an_architecture_survives_its_plain_form():
    assert CLIPConfig.from_dict(TINY.to_dict()) == TINY


def test_positions_resized_keep_the_class_token_and_the_picture_they_make():
    rows, columns = np.mgrid[0:7, 0:7] / 6
    grid = np.stack([rows, columns], axis=-1).reshape(49, 2)
    table = jnp.asarray(np.concatenate([[[9.0, -9.0]], grid]))
    resized = np.asarray(resize_position_embedding(table, 14 * 14 + 1))
    np.testing.assert_array_equal(resized[0], [9.0, -9.0])
    new = resized[1:].reshape(14, 14, 2)
    assert np.all(np.diff(new[:, 0, 0]) > 0)  # rows still run downwards
    assert np.all(np.diff(new[0, :, 1]) > 0)  # columns still run to the right
    np.testing.assert_allclose(new.mean((0, 1)), grid.mean(0), atol=1e-3)
    assert resize_position_embedding(table, 50) is table
