"""`load` finds out what a source is by looking into it."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from safetensors.numpy import save_file

import clip_jax
from clip_jax.checkpoint import ModelCard, load_card, save_weights
from clip_jax.convert import convert
from clip_jax.errors import CheckpointError, WeightsError
from clip_jax.loading import load_tokenizer, read_weights
from clip_jax.models import ResNetConfig, model_config
from clip_jax.preprocess import MEAN, Preprocess
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.weights import big_vision, formats, hub, open_clip, openai, transformers
from clip_jax.weights.source import abstract_model, nest, to_tensors
from tests.weights.small import (
    MEAN_POOLED,
    MODELS,
    RESNET,
    SIGLIP,
    VIT,
    assert_same_arrays,
    random_arrays,
)

GOLDENS = Path(__file__).parent / "goldens" / "weights"
HALF = (0.5, 0.5, 0.5)


def workdir(path, config, preprocess=None, tokenizer=None):
    """A checkpoint of a model with random arrays."""
    arrays = random_arrays(config)
    _, *parts = abstract_model(config)
    params, statistics = (nest({name: arrays[name] for name in part}) for part in parts)
    preprocess = preprocess or Preprocess(config.vision.image_size)
    card = ModelCard(config, preprocess, {}, tokenizer or TokenizerSpec())
    save_weights(path, card, params, statistics)
    return path, arrays


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    messages = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: messages.append(text % values))
    return messages


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    path, arrays = workdir(tmp_path / "run", MODELS[name])
    found = read_weights(path)
    assert found.config == MODELS[name]
    assert_same_arrays(found.arrays, arrays)
    assert_same_arrays(read_weights(path / "checkpoints" / "0").arrays, arrays)


def inputs(config):
    """Those of tests/parity/test_weights.py, with which the goldens were recorded."""
    random = np.random.default_rng(0)
    size, context = config.vision.image_size, config.text.context_length
    images = random.normal(size=(2, size, size, 3)).astype(np.float32)
    end = config.text.vocab_size - 1
    tokens = random.integers(1, end, (2, context)).astype(np.int32)
    for row in range(2):
        at = context - 1 - 3 * row
        tokens[row, at], tokens[row, at + 1 :] = end, 0
    return images, tokens


@pytest.mark.parametrize("name", ["vit_torchscript.pt", "resnet_state_dict.pt"])
def test_recorded_embeddings_of_other_programs(name, warnings):
    """Files that torch wrote, and what open_clip embeds with them; torch is not needed."""
    model, preprocess = clip_jax.load(GOLDENS / name)
    assert model.config.text.activation == "quick_gelu"
    assert preprocess == Preprocess(32 if "vit" in name else 64)
    # The archive of OpenAI's form says what it is; a bare state dict does not.
    assert len(warnings) == ("resnet" in name)
    images, tokens = inputs(model.config)
    with np.load(GOLDENS / "embeddings.npz") as expected, jax.default_matmul_precision("highest"):
        for tower, found in (
            ("image", model.encode_image(images)),
            ("text", model.encode_text(tokens)),
        ):
            wanted = expected[f"{name.split('_')[0]}/{tower}"]
            assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_says_everything_in_its_config(name, tmp_path, warnings):
    if name == "siglip":
        pytest.skip("timm has no image tower so small; tests/parity/test_weights.py has one")
    preprocess = Preprocess(MODELS[name].vision.image_size, HALF, HALF, "squash", "bilinear")
    path, arrays = workdir(tmp_path / "run", MODELS[name], preprocess)
    convert(path, tmp_path / "out", "open_clip")
    for source in (tmp_path / "out", tmp_path / "out" / open_clip.WEIGHTS):
        found = read_weights(source)
        assert found.config == MODELS[name]
        assert found.preprocess == preprocess
        assert_same_arrays(found.arrays, arrays)
    assert not warnings


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_transformers_says_everything_in_its_configs(name, tmp_path, warnings):
    mode = "squash" if name == "siglip" else "shortest"
    preprocess = Preprocess(32, HALF, (0.1, 0.2, 0.3), mode, "bilinear")
    spec = TokenizerSpec("sentencepiece", None, "canonicalize", 1)
    spec = spec if name == "siglip" else TokenizerSpec()
    path, arrays = workdir(tmp_path / "run", MODELS[name], preprocess, spec)
    convert(path, tmp_path / "out", "transformers")
    warnings.clear()
    found = read_weights(tmp_path / "out")
    assert found.config == MODELS[name]
    assert found.preprocess == preprocess
    assert found.tokenizer == spec
    assert_same_arrays(found.arrays, arrays)
    assert not warnings

    # Version 5 keeps the same in a file of another name.
    (tmp_path / "out" / "preprocessor_config.json").rename(tmp_path / "moved.json")
    values = json.loads((tmp_path / "moved.json").read_text())
    newer = tmp_path / "out" / "processor_config.json"
    newer.write_text(json.dumps({"image_processor": values}))
    assert read_weights(tmp_path / "out").preprocess == preprocess
    newer.unlink()
    found = read_weights(tmp_path / "out").preprocess
    assert found == transformers.default_preprocess(32, name.replace("vit", "clip"))
    assert "preprocessor_config.json is not there: taking Transformers' own" in warnings[0]


def test_big_vision_is_told_by_its_shapes(tmp_path):
    arrays = random_arrays(SIGLIP)
    np.savez(tmp_path / "a.npz", **to_tensors(big_vision.rules({}), SIGLIP, arrays))
    found = read_weights(tmp_path / "a.npz")
    assert found.config == SIGLIP
    assert found.preprocess == Preprocess(32, HALF, HALF, "squash", "bicubic")
    assert found.tokenizer == TokenizerSpec("sentencepiece", None, "lower", 1)
    assert_same_arrays(found.arrays, arrays)


def test_lit_has_a_class_token_and_no_head(tmp_path):
    vision = dataclasses.replace(SIGLIP.vision, pool="class", class_token=True)
    config = dataclasses.replace(SIGLIP, vision=vision, logit_bias=False)
    old = {
        "img/Transformer/encoderblock_0/LayerNorm_2/scale": (),
        "txt/Encoder_0/encoderblock_0/LayerNorm_2/scale": (),
    }
    arrays = random_arrays(config)
    tensors = to_tensors(big_vision.rules(old), config, arrays)
    table = tensors.pop("img/pos_embedding")
    tensors["img/Transformer/posembed_input/pos_embedding"] = table
    np.savez(tmp_path / "a.npz", **tensors)
    found = read_weights(tmp_path / "a.npz")
    assert found.config == config
    assert_same_arrays(found.arrays, arrays)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("txt/BertEncoder_0/embedder/kernel", "the text tower is a BERT"),
        ("img/head/kernel", "the image tower ends in a head"),
    ],
)
def test_towers_of_lit_that_are_not_here(tmp_path, name, message):
    tensors = to_tensors(big_vision.rules({}), SIGLIP, random_arrays(SIGLIP))
    np.savez(tmp_path / "a.npz", **tensors | {name: np.zeros(3)})
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "a.npz")


def bare(path, config, prefix=""):
    """A state dict with OpenAI's names and nothing beside it."""
    arrays = random_arrays(config)
    rules = open_clip.rules(config, custom_text=bool(prefix), timm=False)
    path.parent.mkdir(exist_ok=True)
    save_file(to_tensors(rules, config, arrays), path)
    return arrays


def test_what_a_bare_state_dict_does_not_say_is_taken_from_the_named_model(tmp_path, warnings):
    path = tmp_path / "a" / "x.safetensors"
    arrays = bare(path, MEAN_POOLED, "text.")
    found = read_weights(path, model=MEAN_POOLED)
    assert found.config == MEAN_POOLED
    assert_same_arrays(found.arrays, arrays)
    assert "taking the architecture that was named" in warnings[0]
    # And without a name: OpenAI's, and that is said.
    assert read_weights(path).config.text.activation == "quick_gelu"
    assert "does not say its activation and heads, and no named model" in warnings[1]


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-H/14", "RN50"])
def test_a_bare_state_dict_of_a_named_models_shapes_is_that_model(name, warnings):
    config = model_config(name)
    rules = open_clip.rules(config, custom_text=False, timm=False)
    shapes = {entry.name: entry.shape for entry in clip_jax.weights.source.entries(rules, config)}
    tensors = clip_jax.weights.mapping.Tensors("a.bin", shapes, lambda name: None)
    assert formats._config_by_shapes(tensors, "") == config
    assert f"taking those of {name}, which has the same shapes" in warnings[0]


def test_other_resolutions_resize_the_position_table(tmp_path):
    for name in ("vit", "resnet", "siglip"):
        path, _ = workdir(tmp_path / name, MODELS[name])
        model, preprocess = clip_jax.load(path, image_size=96)
        assert preprocess.size == 96
        assert model.config.vision.image_size == 96
        images = np.zeros((1, 96, 96, 3), np.float32)
        assert jax.eval_shape(model.encode_image, images).shape == (1, model.config.embed_dim)
    table = "visual/position_embedding"
    found = read_weights(tmp_path / "vit").arrays[table]
    assert found.shape == (17, 128)
    model, _ = clip_jax.load(tmp_path / "vit", image_size=96)
    assert model.visual.position_embedding.shape == (145, 128)
    np.testing.assert_array_equal(model.visual.position_embedding[0], found[0])


def test_the_compute_dtype_changes_and_the_parameters_stay(tmp_path):
    path, _ = workdir(tmp_path / "run", VIT)
    model, _ = clip_jax.load(path, jnp.bfloat16)
    assert model.logit_scale.dtype == jnp.float32
    assert model.encode_text(np.ones((1, 9), np.int32)).dtype == jnp.bfloat16


def test_openais_names_take_openais_architecture_and_say_where_the_config_differs(
    tmp_path, warnings, monkeypatch
):
    config = dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, activation="gelu"))
    config = dataclasses.replace(config, vision=dataclasses.replace(VIT.vision, activation="gelu"))
    path, _ = workdir(tmp_path / "run", config, Preprocess(32, HALF, HALF))
    convert(path, tmp_path / "out", "open_clip")
    monkeypatch.setitem(clip_jax.models.zoo.MODELS, "ViT-B/32", VIT)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name: asked.append(name) or tmp_path / "out")
    model, preprocess = clip_jax.load("ViT-B/32")
    assert asked == ["timm/vit_base_patch32_clip_224.openai"]
    assert model.config == VIT
    assert preprocess == Preprocess(32)
    assert ["another architecture" in w or "another preprocessing" in w for w in warnings] == [
        True,
        True,
    ]
    assert set(hub.OPENAI) < set(clip_jax.available_models())
    assert len(hub.OPENAI) == 9


# Bad input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/workdir", "nothing at no/such/workdir"),
        ("laion/CLIP-ViT-H-14", "on the hub it would be hf:laion/CLIP-ViT-H-14"),
        ("ViT-B-32", "or one of RN50, .*ViT-B/32"),
        ("hf:nonsense", "expected hf:owner/name"),
    ],
)
def test_nothing_there(source, message):
    with pytest.raises(WeightsError, match=message):
        clip_jax.load(source)


def test_a_folder_without_weights_or_with_several(tmp_path):
    with pytest.raises(WeightsError, match=r"expected one file of weights .* found none"):
        clip_jax.load(tmp_path)
    for name in ("a.pt", "b.pt"):
        shutil.copyfile(GOLDENS / "vit_torchscript.pt", tmp_path / name)
    with pytest.raises(WeightsError, match=r"found a\.pt, b\.pt; give the path of one"):
        clip_jax.load(tmp_path)


def test_a_state_dict_of_another_architecture(tmp_path):
    save_file({"bert.encoder.weight": np.zeros((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"holds no CLIP .* such as bert\.encoder\.weight"):
        clip_jax.load(tmp_path / "a.safetensors")
    save_file({"visual.conv1.weight": np.zeros((2, 3, 4, 4), np.float32)}, tmp_path / "b")
    with pytest.raises(WeightsError, match=r"lacks 'visual\.positional_embedding'"):
        clip_jax.load(tmp_path / "b")


def test_weights_of_another_model_than_the_config_says(tmp_path):
    path, _ = workdir(tmp_path / "run", VIT)
    convert(path, tmp_path / "out", "open_clip")
    config = json.loads((tmp_path / "out" / open_clip.CONFIG).read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 4
    (tmp_path / "out" / open_clip.CONFIG).write_text(json.dumps(config))
    with pytest.raises(WeightsError) as raised:
        clip_jax.load(tmp_path / "out")
    assert "missing: visual.transformer.resblocks.3.ln_1.weight [128]" in str(raised.value)
    assert str(raised.value).count("\n") == 12  # every array of the block


def test_a_config_that_is_missing_or_no_json(tmp_path):
    path, _ = workdir(tmp_path / "run", VIT)
    convert(path, tmp_path / "out", "transformers")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is no JSON"):
        clip_jax.load(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"there is no config\.json beside it"):
        clip_jax.load(tmp_path / "out")
    model, _ = clip_jax.load(tmp_path / "out", model=VIT)
    assert model.config == VIT


def test_an_empty_or_unreadable_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        clip_jax.load(tmp_path)


# Configs of other programs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"attentional_pool": True}}, "nothing for attentional_pool=True"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "nothing for ls_init_value=0.1"),
        ({"vision_cfg": {"pool_type": "avg"}}, "or the mean before the last norm"),
        ({"vision_cfg": {"image_size": [224, 256]}}, "are not square"),
        ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "SigLIP's only"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "nothing for hf_model_name"),
        ({"text_cfg": {"pool_type": "first"}}, "nothing for pool_type='first'"),
        ({"multimodal_cfg": {}}, "nothing for multimodal_cfg"),
        ({"embed_dim": None}, "has no 'embed_dim'"),
        ({"vision_cfg": 3}, "expected an object, found 3"),
    ],
)
def test_what_open_clip_has_and_this_program_has_not_is_named(change, message):
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}} | change
    with pytest.raises(WeightsError, match=message):
        open_clip.read_config({"model_cfg": config}, "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "expected model_type clip or siglip, found 'llama'"),
        ({}, "found 'unknown'"),
        ({"model_type": "clip", "text_config": {"hidden_act": "relu"}}, "hidden_act='relu'"),
        ({"model_type": "clip", "text_config": 3}, "text_config is no object"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "attention pool"),
        ([], "expected an object"),
    ],
)
def test_what_transformers_has_and_this_program_has_not_is_named(values, message):
    with pytest.raises(WeightsError, match=message):
        transformers.read_config(values, "config.json")


def test_a_config_that_says_nothing_is_the_models_of_transformers_defaults():
    config, _ = transformers.read_config({"model_type": "clip"}, "a")
    assert config == model_config("ViT-B/32")
    config, _ = transformers.read_config({"model_type": "siglip"}, "a")
    assert config == model_config("SigLIP-B/16")
    # Old files hold the section twice; the second counts.
    both = {"text_config": {"hidden_act": "gelu"}, "text_config_dict": {"hidden_size": 640}}
    config, _ = transformers.read_config({"model_type": "clip"} | both, "a")
    assert (config.text.width, config.text.activation) == (640, "quick_gelu")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Preprocess(32)),
        ({"size": 32, "crop_size": 32, "resample": 2}, Preprocess(32, interpolation="bilinear")),
        (
            {"size": {"height": 32, "width": 32}, "do_center_crop": False},
            Preprocess(32, resize_mode="squash"),
        ),
    ],
)
def test_preprocessors_of_every_age(values, expected):
    assert transformers.read_preprocess(values, "a", 32, "clip") == expected


@pytest.mark.parametrize(
    "values",
    [
        {"size": 40, "crop_size": 32},
        {"size": {"longest_edge": 32}, "do_center_crop": False},
        {"do_center_crop": False},
        {"do_resize": False},
        {"resample": 0},
    ],
)
def test_preprocessors_that_are_another_transform_are_refused(values):
    with pytest.raises(WeightsError, match=r"^a: "):
        transformers.read_preprocess(values, "a", 32, "clip")


def test_open_clips_names_of_its_siglip_are_those_of_the_zoo():
    config = {
        "embed_dim": 768,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 32000,
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 768,
            "heads": 12,
            "layers": 12,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }
    found, preprocess, tokenizer = open_clip.read_config({"model_cfg": config}, "a")
    zoo = model_config("SigLIP-B/16")
    # timm and OpenCLIP compute this GELU exactly; big_vision and Transformers by tanh.
    exact = {"activation": "gelu"}
    assert found == dataclasses.replace(
        zoo,
        vision=dataclasses.replace(zoo.vision, **exact),
        text=dataclasses.replace(zoo.text, **exact),
    )
    assert preprocess.mean == MEAN
    assert tokenizer.clean == "canonicalize"


# Tokenizers


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    from sentencepiece import SentencePieceTrainer

    path = tmp_path_factory.mktemp("sp") / "spiece.model"
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a cat", "a photo of two dogs", "hello world"] * 20),
        model_writer=model,
        vocab_size=20,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def test_clips_tokenizer_comes_with_the_models_context(tmp_path):
    path, _ = workdir(tmp_path / "run", VIT)
    tokens = load_tokenizer(path)("a cat")
    np.testing.assert_array_equal(tokens, clip_jax.tokenize("a cat", 9))


def test_sentencepiece_ends_and_pads_as_siglip(tmp_path, sentencepiece_file):
    from sentencepiece import SentencePieceProcessor

    spec = TokenizerSpec("sentencepiece", "spiece.model", "canonicalize", 1)
    path, _ = workdir(tmp_path / "run", SIGLIP, tokenizer=spec)
    shutil.copyfile(sentencepiece_file, path / "spiece.model")
    tokenizer = load_tokenizer(path)
    ids = SentencePieceProcessor(model_file=str(sentencepiece_file)).encode("a cat")
    np.testing.assert_array_equal(tokenizer("A,  cat!"), [ids + [1] * (8 - len(ids))])
    assert tokenizer.decode(ids) == "a cat"
    long = tokenizer("a photo of a cat and two dogs", truncate=True)
    assert long.shape == (1, 8)
    assert long[0, -1] == 1  # end of text stays
    with pytest.raises(ValueError, match="pass truncate=True"):
        tokenizer("a photo of a cat and two dogs")
    with pytest.raises(TypeError):
        tokenizer(3)


def test_the_sentencepiece_model_travels(tmp_path, sentencepiece_file):
    arrays = random_arrays(SIGLIP)
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "x.npz", **to_tensors(big_vision.rules({}), SIGLIP, arrays))
    shutil.copyfile(sentencepiece_file, tmp_path / "a" / "spiece.model")
    expected = load_tokenizer(tmp_path / "a")("A cat,")
    convert(tmp_path / "a" / "x.npz", tmp_path / "b", "clip_jax")
    convert(tmp_path / "b", tmp_path / "c", "transformers")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "b")("A cat,"), expected)
    assert load_card(tmp_path / "b").tokenizer == TokenizerSpec(
        "sentencepiece", "spiece.model", "lower", 1
    )
    assert (tmp_path / "c" / "spiece.model").exists()


def test_a_sentencepiece_model_that_is_missing_or_broken(tmp_path):
    np.savez(tmp_path / "a.npz", **to_tensors(big_vision.rules({}), SIGLIP, random_arrays(SIGLIP)))
    with pytest.raises(WeightsError, match="its file is not beside the weights"):
        load_tokenizer(tmp_path / "a.npz")
    with pytest.raises(WeightsError, match="no SentencePiece model at"):
        load_tokenizer(tmp_path / "a.npz", file=tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"junk")
    with pytest.raises(WeightsError, match="is no SentencePiece model"):
        load_tokenizer(tmp_path / "a.npz", file=tmp_path / "bad.model")


def test_gemmas_vocabulary_pads_with_zero():
    assert TokenizerSpec.siglip(256_000, "lower", None).pad == 0
    assert TokenizerSpec.siglip(32_000, "lower", None).pad == 1
    assert TokenizerSpec.from_dict("clip-bpe-49408") == TokenizerSpec()


def test_the_architecture_of_a_state_dict_is_told_by_its_shapes():
    for config in (VIT, RESNET, model_config("RN50x4"), model_config("ViT-L/14@336px")):
        rules = open_clip.rules(config, custom_text=False, timm=False)
        table = clip_jax.weights.source.entries(rules, config)
        found = openai.architecture({e.name: e.shape for e in table}, "quick_gelu")
        if not isinstance(config.vision, ResNetConfig):
            assert int(found.vision.width * found.vision.mlp_ratio) == int(
                config.vision.width * config.vision.mlp_ratio
            )
        assert found == config
