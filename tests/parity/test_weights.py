"""Weights of open_clip, Transformers and big_vision, loaded here and there: the same embeddings.

Random weights, float32, highest matmul precision. As a script (needs torch) it records the files
and embeddings that the plain tests compare with:

    python -m tests.parity.test_weights --record
"""

import argparse
import gc
import itertools
import json
import logging
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.convert import convert
from clip_jax.loading import read_weights
from clip_jax.weights import big_vision, open_clip, openai
from clip_jax.weights.mapping import read
from clip_jax.weights.source import entries, to_tensors
from tests.parity.programs import (
    SMALL,
    as_file,
    built,
    inputs,
    numpy_state,
    our_arrays,
    our_config,
    perturbed,
    relative,
    their_model,
    theirs,
    torch,
)
from tests.weights.small import SIGLIP, random_arrays

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -e '.[parity]'"
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"
TOLERANCE = 1e-5  # relative, of a whole batch of embeddings
OPENAI = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"]
OPENAI += ["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]
BIG = {"RN50x16", "RN50x64", "ViT-L/14", "ViT-L/14@336px"}


@jax.jit
def embeddings(model, images, tokens):
    with jax.default_matmul_precision("highest"):
        return model.encode_image(images), model.encode_text(tokens)


def assert_agrees(ours, model, batch=2):
    """The embeddings of open_clip's `model`; returns the larger relative difference."""
    images, tokens = inputs(ours.config, batch)
    with torch.no_grad():
        image = model.encode_image(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        text = model.encode_text(torch.tensor(tokens, dtype=torch.long)).numpy()
    found = embeddings(ours, images, tokens)
    differences = [relative(a, b) for a, b in zip(found, (image, text), strict=True)]
    assert max(differences) < TOLERANCE
    return max(differences)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in OPENAI],
)
def test_the_models_of_the_paper_embed_as_open_clips(name, record_property):
    their_name = name.replace("@336px", "-336").replace("/", "-") + "-quickgelu"
    described = theirs.get_model_config(their_name)
    config = our_config(described)
    assert config == clip_jax.models.model_config(name)
    model = their_model(described)
    arrays = our_arrays(config, numpy_state(model))
    ours = built(config, arrays)
    difference = assert_agrees(ours, model, batch=1 if name in BIG else 2)
    record_property("relative difference", float(difference))
    print(f"{name}: {difference:.2g}")
    del model, ours, arrays
    gc.collect()
    jax.clear_caches()


def save_open_clip(folder, config, model, form):
    folder.mkdir(exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    values = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, folder / "open_clip_model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    elif form == "legacy":
        path = folder / "open_clip_pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:  # what open_clip's training leaves
        state = {f"module.{name}": tensor for name, tensor in state.items()}
        optimizer = torch.optim.AdamW(model.parameters()).state_dict()
        whole = {"epoch": 3, "name": "a run", "state_dict": state, "optimizer": optimizer}
        torch.save(whole, folder / "epoch_3.pt")
    return folder


FORMS = [(name, "safetensors") for name in SMALL]
FORMS += itertools.product(["vit", "resnet"], ["bin", "legacy", "checkpoint"])


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_of_open_clips_files(name, form, tmp_path):
    model = their_model(SMALL[name])
    ours, preprocess = clip_jax.load(save_open_clip(tmp_path / "a", SMALL[name], model, form))
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert_agrees(ours, model)


def halved(model):
    """Weights that half precision holds exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def save_torchscript(path, model, config):
    """An archive with the names, constants and half precision of OpenAI's."""
    size, context = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    vocabulary = config["text_cfg"]["vocab_size"]
    constants = {
        "input_resolution": size,
        "context_length": context,
        "vocab_size": vocabulary,
    }
    for name, value in constants.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    methods = {
        "encode_image": (torch.zeros(1, 3, size, size),),
        "encode_text": (torch.zeros(1, context, dtype=torch.long),),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, the released archives are not
        archive = torch.jit.trace_module(model, methods, check_trace=False)
        for parameter in archive.parameters():
            parameter.data = parameter.data.half()
        torch.jit.save(archive, path)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_torchscript_archive_is_read_without_running_it(name, tmp_path, monkeypatch):
    path = tmp_path / "whatever.bin"
    save_torchscript(path, halved(their_model(SMALL[name])), SMALL[name])
    with monkeypatch.context() as without:
        without.setattr(torch.jit, "load", None)
        without.setattr(torch, "load", None)
        ours, preprocess = clip_jax.load(path)
    assert preprocess == clip_jax.Preprocess(SMALL[name]["vision_cfg"]["image_size"])
    assert ours.config.text.activation == "quick_gelu"
    assert_agrees(ours, halved(their_model(SMALL[name])))


def transformers_model(name):
    common = {"num_hidden_layers": 2, "intermediate_size": 96, "hidden_size": 48}
    image_size = 38 if name == "siglip with a margin" else 32
    vision = common | {"num_attention_heads": 3, "image_size": image_size, "patch_size": 8}
    text = common | {"num_attention_heads": 4, "max_position_embeddings": 8, "vocab_size": 60}
    special = {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 59}
    torch.manual_seed(0)
    if name == "clip":
        config = transformers.CLIPConfig(
            text_config=text | special | {"hidden_act": "gelu"},
            vision_config=vision,
            projection_dim=24,
        )
        return perturbed(transformers.CLIPModel(config))
    config = transformers.SiglipConfig(text_config=text | special, vision_config=vision)
    return perturbed(transformers.SiglipModel(config))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip with a margin"])
@pytest.mark.parametrize("shards", [False, True])
def test_transformers_folders(name, shards, tmp_path):
    model = transformers_model(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    ours, _ = clip_jax.load(tmp_path)
    images, tokens = inputs(ours.config)
    with torch.no_grad():
        found = model(
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
            input_ids=torch.tensor(tokens, dtype=torch.long),
        )
    image, text = embeddings(ours, images, tokens)
    assert relative(l2(image), found.image_embeds.numpy()) < TOLERANCE
    assert relative(l2(text), found.text_embeds.numpy()) < TOLERANCE
    with jax.default_matmul_precision("highest"):
        per_image, per_text = ours(images, tokens)
    assert relative(per_image, found.logits_per_image.numpy()) < TOLERANCE
    assert relative(per_text, found.logits_per_text.numpy()) < TOLERANCE


def l2(x):
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip with a margin"])
def test_transformers_loads_what_convert_writes_without_a_word(name, tmp_path, caplog):
    model = transformers_model(name)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", "clip_jax")
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert not any(info.values())
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_pixels_beyond_the_last_patch_are_left_out_as_by_open_clip(tmp_path):
    config = SMALL["vit"] | {"vision_cfg": SMALL["vit"]["vision_cfg"] | {"image_size": 38}}
    model = their_model(config)
    save_open_clip(tmp_path, config, model, "safetensors")
    ours, preprocess = clip_jax.load(tmp_path)
    assert preprocess.size == ours.config.vision.image_size == 38
    assert 38 % ours.config.vision.patch_size
    assert_agrees(ours, model)


@pytest.mark.parametrize("name", SMALL)
def test_open_clip_loads_what_convert_writes(name, tmp_path):
    model = their_model(SMALL[name])
    save_open_clip(tmp_path / "source", SMALL[name], model, "safetensors")
    convert(tmp_path / "source", tmp_path / "ours", "clip_jax")
    convert(tmp_path / "ours", tmp_path / "back", "open_clip")
    again, preprocess = theirs.create_model_from_pretrained(f"local-dir:{tmp_path / 'back'}")
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for key, tensor in again.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(tensor, state[key]), key
    assert preprocess.transforms[-1].mean == [0.5] * 3
    images, tokens = inputs(read_weights(tmp_path / "ours").config)
    again.eval()
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))
        ids = torch.tensor(tokens, dtype=torch.long)
        assert torch.equal(again.encode_text(ids), model.encode_text(ids))


class Siglip(torch.nn.Module):
    """open_clip's SigLIP, with towers of the size of `tests.weights.small.SIGLIP`."""

    def __init__(self):
        import timm

        super().__init__()
        vision, text = SIGLIP.vision, SIGLIP.text
        self.visual = torch.nn.Module()
        self.visual.trunk = timm.models.VisionTransformer(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.width,
            depth=vision.layers,
            num_heads=vision.heads,
            mlp_ratio=vision.mlp_ratio,
            act_layer="gelu_tanh",
            class_token=False,
            global_pool="map",
            num_classes=0,
        )
        self.text = theirs.transformer.TextTransformer(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=text.mlp_ratio,
            output_dim=SIGLIP.embed_dim,
            no_causal_mask=True,
            pool_type="last",
            proj_bias=True,
            act_layer=lambda: torch.nn.GELU(approximate="tanh"),
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        )
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-9.0))

    def encode_image(self, images):
        return self.visual.trunk(images)

    def encode_text(self, tokens):
        return self.text(tokens)


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("stacked", [False, True])
def test_big_visions_files_are_read_as_open_clip_reads_them(prefix, stacked, tmp_path):
    form = (
        {f"{tower}/encoderblock/LayerNorm_0/scale": () for tower in BIG_VISION} if stacked else {}
    )
    tensors = to_tensors(big_vision.rules(form), SIGLIP, random_arrays(SIGLIP))
    path = tmp_path / "siglip.npz"
    np.savez(path, **{prefix + name: tensor for name, tensor in tensors.items()})
    model = Siglip().eval()
    theirs.convert.load_big_vision_weights(model, str(path))
    ours, preprocess = clip_jax.load(path)
    assert ours.config == SIGLIP
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert_agrees(ours, model)
    assert float(ours.logit_scale[...]) == model.logit_scale.item()
    assert float(ours.logit_bias[...]) == model.logit_bias.item()


BIG_VISION = ("img/Transformer", "txt/Encoder_0")


def test_timms_names_of_siglip_are_read_as_open_clip_writes_them():
    model = perturbed(Siglip())
    rules = open_clip.rules(SIGLIP, custom_text=True, timm=True)
    arrays = dict(read(entries(rules, SIGLIP), as_file(numpy_state(model)), openai.IGNORED))
    assert_agrees(built(SIGLIP, arrays), model)


def record():
    """Writes the goldens anew: files in the formats of other programs, and what those embed."""
    GOLDENS.mkdir(exist_ok=True)
    expected = {}
    for name in ("vit", "resnet"):
        config = json.loads(json.dumps(SMALL[name]))
        if name == "vit":
            config["vision_cfg"] |= {"layers": 1}
        else:
            config["vision_cfg"] |= {"layers": [1, 2, 1, 1], "width": 4}
        config["text_cfg"] |= {"layers": 1}
        model = halved(their_model(config))
        with torch.no_grad():
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(buffer.half().float())
        images, tokens = inputs(our_config(config))
        with torch.no_grad():
            image = model.encode_image(torch.tensor(images.transpose(0, 3, 1, 2)))
            text = model.encode_text(torch.tensor(tokens, dtype=torch.long))
        expected |= {f"{name}/image": image.numpy(), f"{name}/text": text.numpy()}
        if name == "vit":
            save_torchscript(GOLDENS / "vit_torchscript.pt", model, config)
        else:
            state = {key: tensor.half() for key, tensor in model.state_dict().items()}
            torch.save({"state_dict": state}, GOLDENS / "resnet_state_dict.pt")
    np.savez(GOLDENS / "embeddings.npz", **expected)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    record()
