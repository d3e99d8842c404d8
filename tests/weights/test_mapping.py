"""The tables: every one reads what it writes, and refuses what does not fit."""

import re

import numpy as np
import pytest

from clip_jax.errors import WeightsError
from clip_jax.models import model_config
from clip_jax.weights import big_vision, open_clip, transformers
from clip_jax.weights.mapping import Rule, Tensors, plan, read, write
from clip_jax.weights.source import entries, to_tensors
from tests.weights.small import MEAN_POOLED, RESNET, SIGLIP, VIT, random_arrays

TABLES = {
    "open_clip, ViT": (VIT, open_clip.rules(VIT, custom_text=False, timm=False)),
    "open_clip, ResNet": (RESNET, open_clip.rules(RESNET, custom_text=False, timm=False)),
    "open_clip, text apart": (MEAN_POOLED, open_clip.rules(VIT, custom_text=True, timm=False)),
    "open_clip, timm": (SIGLIP, open_clip.rules(SIGLIP, custom_text=True, timm=True)),
    "transformers, CLIP": (VIT, transformers.RULES["clip"]),
    "transformers, SigLIP": (SIGLIP, transformers.RULES["siglip"]),
    "big_vision": (SIGLIP, big_vision.rules({})),
    "big_vision, stacked": (
        SIGLIP,
        big_vision.rules(
            {
                "img/Transformer/encoderblock/LayerNorm_0/scale": (2, 48),
                "txt/Encoder_0/encoderblock/LayerNorm_0/scale": (2, 48),
            }
        ),
    ),
    "big_vision, old names": (
        SIGLIP,
        big_vision.rules(
            {
                "img/Transformer/encoderblock_0/LayerNorm_2/scale": (48,),
                "txt/Encoder_0/encoderblock_0/LayerNorm_2/scale": (48,),
            }
        ),
    ),
}


def opened(tensors):
    return Tensors("a file", {k: v.shape for k, v in tensors.items()}, tensors.__getitem__)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_reads_back_what_it_writes(name):
    config, rules = TABLES[name]
    arrays = random_arrays(config)
    tensors = to_tensors(rules, config, arrays)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    assert sum(t.size for t in tensors.values()) == sum(a.size for a in arrays.values())
    found = dict(read(entries(rules, config), opened(tensors)))
    assert found.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", "ViT-bigG/14", "SigLIP-B/16"])
def test_the_tables_have_an_entry_for_every_array_of_the_named_models(name):
    config = model_config(name)
    siglip = config.logit_bias
    entries(open_clip.rules(config, custom_text=siglip, timm=siglip), config)


def test_torch_linear_layers_are_transposed_and_heads_split():
    heads, width, inner = 2, 6, 3
    fused = np.arange(3 * width * width).reshape(3 * width, width).astype(np.float32)
    rule = Rule("in_proj", ("q", "k", "v"), "(n k h) d -> n d k h")
    shapes = dict.fromkeys("qkv", (width, heads, inner))
    found = dict(read(plan([rule], shapes, {}), opened({"in_proj": fused})))
    for part, name in enumerate("qkv"):
        block = fused[part * width : (part + 1) * width]
        for head in range(heads):
            rows = block[head * inner : (head + 1) * inner]
            np.testing.assert_array_equal(found[name][:, head], rows.T)


def test_a_patch_kernel_is_flattened_as_the_model_flattens_patches():
    kernel = np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32)
    rule = Rule("conv", "kernel", "d c p q -> (p q c) d")
    table = plan([rule], {"kernel": (12, 5)}, {"c": 3, "p": 2, "q": 2})
    found = dict(read(table, opened({"conv": kernel})))["kernel"]
    patch = np.random.default_rng(1).normal(size=(2, 2, 3))  # p q c
    expected = np.einsum("pqc,dcpq->d", patch, kernel)
    np.testing.assert_allclose(patch.reshape(-1) @ found, expected, rtol=1e-5)


def test_layers_are_stacked_in_the_order_of_their_numbers():
    rule = Rule("layer{stage}.{layer}.w", "stage{stage}/rest/w", first_layer=1)
    shapes = {"stage3/rest/w": (12, 2)}
    tensors = {f"layer3.{n}.w": np.float32([n, -n]) for n in range(12, 0, -1)}
    found = dict(read(plan([rule], shapes, {}), opened(tensors)))["stage3/rest/w"]
    np.testing.assert_array_equal(found[:, 0], range(1, 13))


def test_a_scalar_may_come_with_an_axis():
    table = plan([Rule("logit_scale", "logit_scale")], {"logit_scale": ()}, {})
    found = dict(read(table, opened({"logit_scale": np.float32([4.5])})))
    assert found["logit_scale"].shape == ()
    assert write(table, found)["logit_scale"].shape == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_arrays_become_float32(dtype):
    table = plan([Rule("a", "a")], {"a": (3,)}, {})
    found = dict(read(table, opened({"a": np.array([1, 2.5, -3], dtype)})))["a"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [1, 2.5, -3])


def test_all_that_does_not_fit_is_reported_at_once_with_its_shapes():
    rules = TABLES["open_clip, ViT"][1]
    tensors = to_tensors(rules, VIT, random_arrays(VIT))
    del tensors["visual.ln_pre.bias"]
    del tensors["transformer.resblocks.1.mlp.c_fc.weight"]
    tensors["visual.extra"] = np.zeros([2, 3], np.float32)
    tensors["text_projection"] = np.zeros([24, 64], np.float32)
    tensors["logit_scale"] = np.zeros([2], np.float32)
    with pytest.raises(WeightsError) as raised:
        list(read(entries(rules, VIT), opened(tensors)))
    lines = str(raised.value).splitlines()
    assert "a file does not fit the model (5 of its entries)" in lines[0]
    assert {line.strip() for line in lines[1:]} == {
        "missing: visual.ln_pre.bias [128]",
        "missing: transformer.resblocks.1.mlp.c_fc.weight [256, 64]",
        "unexpected: visual.extra [2, 3]",
        "mis-shaped: text_projection: expected [64, 24], found [24, 64]",
        "mis-shaped: logit_scale: expected [], found [2]",
    }


def test_what_holds_nothing_learned_is_passed_over():
    table = plan([Rule("a", "a")], {"a": ()}, {})
    tensors = opened({"a": np.float32(1), "bn.num_batches_tracked": np.int64(7)})
    with pytest.raises(WeightsError, match=r"unexpected: bn\.num_batches_tracked"):
        list(read(table, tensors))
    assert dict(read(table, tensors, [r".*\.num_batches_tracked"])) == {"a": 1}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("a", "a")], "no rule fills b"),
        ([Rule("a", "a"), Rule("c", "a"), Rule("b", "b")], "more than one rule fills a"),
        ([Rule("a", "a"), Rule("a", "b")], "more than one rule claims a"),
    ],
)
def test_a_wrong_table_is_refused(rules, message):
    with pytest.raises(WeightsError, match=re.escape(message)):
        plan(rules, {"a": (2,), "b": (2,)}, {})
