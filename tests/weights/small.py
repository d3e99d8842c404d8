"""Small models of every kind, with random arrays, for the tests of weights."""

import dataclasses

import numpy as np

from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from clip_jax.weights.source import abstract_model

# Heads of width 64 where no config says otherwise; else the heads are odd on purpose.
TEXT = TextConfig(width=64, heads=1, layers=2, context_length=9, vocab_size=50)
VIT = CLIPConfig(
    24, ViTConfig(image_size=32, patch_size=8, width=128, layers=3, heads=2, mlp_ratio=2.0), TEXT
)
RESNET = CLIPConfig(24, ResNetConfig(image_size=64, width=4, layers=(1, 2, 3, 1), heads=2), TEXT)
SIGLIP = CLIPConfig(
    48,
    ViTConfig(
        image_size=32,
        patch_size=8,
        width=48,
        layers=2,
        heads=3,
        mlp_ratio=2.5,
        activation="gelu_tanh",
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection=False,
        norm_epsilon=1e-6,
    ),
    TextConfig(
        width=48,
        heads=4,
        layers=2,
        context_length=8,
        vocab_size=60,
        activation="gelu_tanh",
        pool="last",
        causal=False,
        projection_bias=True,
        norm_epsilon=1e-6,
    ),
    logit_bias=True,
)
MEAN_POOLED = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, pool="mean", pre_norm=False, activation="gelu"),
    text=dataclasses.replace(TEXT, pool="last", causal=False, activation="gelu"),
)
MODELS = {"vit": VIT, "resnet": RESNET, "siglip": SIGLIP, "mean": MEAN_POOLED}


def random_arrays(config, seed=0):
    """Path -> float32 array of every parameter and statistic; none is zero or one."""
    random = np.random.default_rng(seed)
    _, params, statistics = abstract_model(config)
    arrays = {path: 0.1 * random.normal(size=leaf.shape) for path, leaf in params.items()}
    arrays |= {path: random.uniform(0.5, 1.5, leaf.shape) for path, leaf in statistics.items()}
    return {path: np.asarray(array, np.float32) for path, array in arrays.items()}


def assert_same_arrays(found, expected):
    """The same paths, and bit for bit the same numbers."""
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), array, err_msg=path)
