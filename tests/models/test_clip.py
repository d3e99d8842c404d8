"""The towers: exact sizes, an independent NumPy implementation, and what must not matter."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.errors import ConfigError
from clip_jax.models import CLIP, CLIPConfig, TextConfig, Training, ViTConfig, model_config
from clip_jax.models.vit import drop_patches
from clip_jax.tokenizer import EOT, SOT
from tests.models.reference import Reference
from tests.models.seeded import seeded

TINY = CLIPConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=16, patch_size=4, width=32, layers=3, heads=4),
    text=TextConfig(width=16, heads=2, layers=2, context_length=12),
)


def replaced(vision=None, text=None, **whole):
    return dataclasses.replace(
        TINY,
        vision=dataclasses.replace(TINY.vision, **vision or {}),
        text=dataclasses.replace(TINY.text, **text or {}),
        **whole,
    )


def tiny_model(config=TINY, **kwargs):
    return seeded(lambda: CLIP(config, rngs=nnx.Rngs(0), **kwargs))


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


VARIANTS = {
    "CLIP": TINY,
    "OpenCLIP": replaced(vision={"activation": "gelu"}, text={"activation": "gelu"}),
    "SigLIP": replaced(
        vision={
            "activation": "gelu_tanh",
            "pool": "map",
            "class_token": False,
            "pre_norm": False,
            "patch_bias": True,
            "projection": False,
            "norm_epsilon": 1e-3,
        },
        text={
            "activation": "gelu_tanh",
            "pool": "last",
            "causal": False,
            "projection_bias": True,
            "norm_epsilon": 1e-3,
        },
        embed_dim=32,
        logit_bias=True,
    ),
    "mean of the patches": replaced(vision={"pool": "mean"}),
    "mean without a class token": replaced(
        vision={"pool": "mean", "class_token": False},
        text={"projection": False, "width": 24, "heads": 3},
    ),
}


@jax.jit
def forward(model, images, tokens):
    features = {
        layer: (
            model.encode_image(images, return_features=True, layer=layer),
            model.encode_text(tokens, return_features=True, layer=layer),
        )
        for layer in (0, 1, -2, -1)
    }
    return model.encode_image(images), model.encode_text(tokens), model(images, tokens), features


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_towers_equal_the_numpy_reference(config):
    model = tiny_model(config)
    reference = Reference(model)
    with jax.default_matmul_precision("highest"):
        found_image, found_text, (per_image, per_text), features = forward(
            model, images(), tokens()
        )
    expected_image, expected_text = reference.image(images()), reference.text(tokens())
    np.testing.assert_allclose(found_image, expected_image, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_text, expected_text, rtol=1e-5, atol=1e-5)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (expected_image, expected_text)]
    logits = np.exp(float(model.logit_scale[...])) * unit[0] @ unit[1].T
    logits += float(model.logit_bias[...]) if config.logit_bias else 0
    np.testing.assert_allclose(per_image, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(per_text, logits.T, rtol=1e-4, atol=1e-4)
    states = reference.image_states(images()), reference.text_states(tokens())
    for layer, found in features.items():  # counted as Hugging Face counts its hidden states
        for ours, theirs in zip(found, states, strict=True):
            np.testing.assert_allclose(ours, theirs[layer], rtol=1e-4, atol=1e-5)


def test_features_go_through_the_final_norm_when_asked():
    model = tiny_model()
    reference = Reference(model)
    found = model.encode_text(tokens(), return_features=True, layer=-2, final_norm=True)
    expected = reference.layer_norm(
        reference.text_states(tokens())[-2], reference.params["text"]["ln_final"], 1e-5
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    found = model.encode_image(images(), return_features=True, final_norm=True)
    expected = reference.layer_norm(
        reference.image_states(images())[-1], reference.params["visual"]["ln_post"], 1e-5
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_does_not_exist_or_without_features_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="layer 4: expected -4 to 3 for 3 layers"):
        model.encode_image(images(), return_features=True, layer=4)
    with pytest.raises(ValueError, match="pass return_features=True"):
        model.encode_text(tokens(), layer=-2)


def test_patch_dropout_keeps_a_share_of_the_patches_and_the_same_ones_for_the_same_key():
    config = replaced(vision={"patch_dropout": 0.75})
    model, whole = tiny_model(config), tiny_model()
    keys = jax.random.split(jax.random.key(5), 3)

    def encode(keys, x=None):
        return model.encode_image(images() if x is None else x, training=Training(keys))

    tokens_seen = model.visual.features(images(), training=Training(keys)).shape[1]
    assert tokens_seen == 1 + 4  # a quarter of 16 patches, and the class token always
    np.testing.assert_array_equal(encode(keys), encode(keys))
    assert not np.allclose(encode(keys), encode(jax.random.split(jax.random.key(6), 3)))
    # An image's patches depend on its own key alone, not on its place in the batch.
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(encode(keys[order], images()[order]), encode(keys)[order], atol=1e-5)
    # Outside training nothing is dropped.
    np.testing.assert_array_equal(model.encode_image(images()), whole.encode_image(images()))
    with pytest.raises(ValueError, match="a random key for each image"):
        model.encode_image(images(), training=Training())


def test_patches_are_dropped_evenly():
    x = jnp.broadcast_to(jnp.arange(16.0)[None, :, None], (4000, 16, 1))
    kept = drop_patches(x, jax.random.split(jax.random.key(0), 4000), 0.5)
    assert kept.shape == (4000, 8, 1)
    assert all(len(set(row)) == 8 for row in np.asarray(kept[:50, :, 0]).tolist())
    share = np.bincount(np.asarray(kept, int).ravel(), minlength=16) / 4000
    np.testing.assert_allclose(share, 0.5, atol=0.04)  # five standard deviations


def test_a_text_read_at_its_last_token_must_be_padded_to_the_context():
    with pytest.raises(ValueError, match="padded to 12 tokens, got 7"):
        tiny_model(VARIANTS["SigLIP"]).encode_text(tokens()[:, :7])


def test_what_follows_the_end_of_text_and_how_much_padding_does_not_matter():
    model = tiny_model()
    full = model.encode_text(tokens())
    dirty = tokens().at[0, 8].set(5).at[1, 6].set(999)  # smaller ids than EOT
    np.testing.assert_allclose(model.encode_text(dirty), full, atol=1e-5)
    np.testing.assert_allclose(model.encode_text(tokens()[:2, :7]), full[:2], atol=1e-5)


def test_rows_do_not_influence_each_other():
    model = tiny_model()
    np.testing.assert_allclose(
        model.encode_image(images())[1:2], model.encode_image(images()[1:2]), atol=1e-5
    )


@pytest.mark.parametrize("remat", ["dots", "dots_no_hidden", "full"])
def test_remat_changes_no_gradient(remat):
    @jax.jit
    def gradient(model):
        return jax.grad(lambda m: jnp.sum(m(images(), tokens())[0] ** 2))(model)

    def gradients(remat):
        return gradient(tiny_model(remat=remat))

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
        ("vision", {"class_token": False}, "needs vision.class_token=True"),
        ("vision", {"projection": False}, "expected embed_dim 32, got 24"),
        ("vision", {"patch_dropout": 1.0}, "patch_dropout=1.0: expected a share"),
        ("text", {"projection": False}, "expected embed_dim 16, got 24"),
        ("vision", {"patch_size": 5}, "patches of 5 pixels do not divide an image of 16"),
        ("vision", {"patch_size": 17, "margin": True}, "patches of 17 pixels do not divide"),
        ("vision", {"heads": 5}, "5 heads do not divide the width 32"),
        ("text", {"heads": 3}, "3 heads do not divide the width 16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(part, change, message):
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: CLIP(replaced(**{part: change}), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("config", [TINY, VARIANTS["SigLIP"], model_config("RN50")])
def test_an_architecture_survives_its_plain_form(config):
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_architecture_written_before_there_were_variants_is_read():
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "heads": 4}
    old = {
        "embed_dim": 24,
        "vision": vision | {"mlp_ratio": 4.0, "activation": "quick_gelu"},
        "text": {"width": 16, "heads": 2, "layers": 2, "context_length": 12},
    }
    assert CLIPConfig.from_dict(old) == TINY
