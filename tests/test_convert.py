"""Out to other programs' forms and back: bit for bit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax import tokenizer
from clip_jax.convert import convert
from clip_jax.errors import CheckpointError, WeightsError
from clip_jax.loading import read_weights
from clip_jax.models import model_config
from clip_jax.weights import open_clip, transformers
from clip_jax.weights.source import abstract_model
from tests.test_loading import workdir
from tests.weights.small import MEAN_POOLED, RESNET, SIGLIP, VIT, assert_same_arrays

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("config", "forms"),
    [
        (VIT, ["open_clip", "transformers", "clip_jax", "open_clip"]),
        (RESNET, ["open_clip", "clip_jax"]),
        (SIGLIP, ["transformers", "clip_jax"]),
        (MEAN_POOLED, ["open_clip", "clip_jax"]),
    ],
    ids=["vit", "resnet", "siglip", "mean"],
)
def test_round_trips_are_bit_exact(config, forms, tmp_path, monkeypatch):
    source, arrays = workdir(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path)
    for number, form in enumerate(forms):
        target = f"out/{number}"  # relative, as people type it
        convert(source, target, form)
        found = read_weights(target)
        assert found.config == config
        assert_same_arrays(found.arrays, arrays)
        source = target


def test_the_vocabulary_in_transformers_files_is_clips(tmp_path):
    source, _ = workdir(tmp_path / "run", VIT)
    convert(source, tmp_path / "out", "transformers")
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(tokenizer.VOCAB_SIZE))
    assert vocabulary["<|startoftext|>"] == tokenizer.SOT
    assert vocabulary["<|endoftext|>"] == tokenizer.EOT
    assert vocabulary["photo</w>"] == tokenizer.Tokenizer().encode("photo")[0]
    merges = (tmp_path / "out" / "merges.txt").read_text().splitlines()
    assert len(merges) == tokenizer.NUM_MERGES + 1
    # Each merge makes the symbol of its rank.
    for rank in (0, 1, 1000, tokenizer.NUM_MERGES - 1):
        assert vocabulary[merges[1 + rank].replace(" ", "")] == 512 + rank
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("config", "form", "message"),
    [
        (RESNET, "transformers", "no CLIP with a ResNet; convert it --to=open_clip"),
        (MEAN_POOLED, "transformers", "vision.pool is 'mean', in its clip model 'class'"),
        (SIGLIP, "open_clip", "timm has no SigLIP image tower of this size"),
        (
            dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, activation="gelu")),
            "open_clip",
            "one tower has QuickGELU and the other has not",
        ),
        (
            dataclasses.replace(VIT, logit_bias=True),
            "transformers",
            "vision.patch_bias is False, in its siglip model True",
        ),
    ],
)
def test_what_a_form_cannot_say_is_named(config, form, message, tmp_path):
    source, _ = workdir(tmp_path / "run", config)
    with pytest.raises(WeightsError, match=message):
        convert(source, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_open_clip_knows_the_zoos_siglip_but_for_its_gelu():
    zoo = model_config("SigLIP-B/16")
    with pytest.raises(WeightsError, match="activation='gelu', not 'gelu_tanh'"):
        open_clip.write_config(zoo, transformers.default_preprocess(224, "siglip"))
    exact = dataclasses.replace(
        zoo,
        vision=dataclasses.replace(zoo.vision, activation="gelu"),
        text=dataclasses.replace(zoo.text, activation="gelu"),
    )
    values, _ = open_clip.write_config(exact, transformers.default_preprocess(224, "siglip"))
    assert values["model_cfg"]["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    assert open_clip.read_config(values, "a")[0] == exact


def test_timms_so400m_at_384_pixels_leaves_out_six_of_them():
    name = "vit_so400m_patch14_siglip_384"
    vision = {"timm_model_name": name, "image_size": 384, "timm_pool": "map", "timm_proj": "none"}
    model = {"embed_dim": 1152, "vision_cfg": vision, "text_cfg": {"width": 1152, "heads": 16}}
    config, preprocess, _ = open_clip.read_config({"model_cfg": model}, "a")
    assert preprocess.size == 384
    assert config.vision.tokens == 27**2
    assert open_clip.timm_name(config.vision) == name
    abstract_model(config)  # it can be made


def test_a_target_that_is_not_empty_is_left_alone(tmp_path):
    source, _ = workdir(tmp_path / "run", VIT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(WeightsError, match="not empty"):
        convert(source, tmp_path / "out", "open_clip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="is there already"):
        workdir(tmp_path / "run", VIT)


@pytest.mark.slow
def test_the_command(tmp_path):
    workdir(tmp_path / "run", VIT)

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "clip_jax.convert", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    done = command(tmp_path / "run", tmp_path / "out", "--to=transformers")
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    failed = command(tmp_path / "run", tmp_path / "out", "--to=transformers")
    assert failed.returncode == 1
    assert "WeightsError: " in failed.stderr
    assert "Traceback" not in failed.stderr
