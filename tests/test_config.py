import importlib
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from clip_jax.config import architecture, default_config, parse_flags
from clip_jax.errors import ConfigError
from clip_jax.models import model_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses a command line as train.py would, in flags of its own."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from clip_jax.config import default_config as get_config\n")

    def parse(*arguments, config=str(recipe)):
        holder = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", holder)
        config_flags.DEFINE_config_file("config", flag_values=holder, lock_config=True)
        argv = ["train.py", *([f"--config={config}"] if config else []), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        parse_flags(argv)
        return holder.config

    return parse


def test_single_keys_can_be_set(parse):
    config = parse(
        "--config.optim.peak_lr=1e-3",
        "--config.train.steps=7",
        "--config.model.vision.width=96",
        "--config.eval.datasets=('glyphs',)",
        "--config.data.crop=(0.5, 0.75)",
    )
    assert config.optim.peak_lr == 1e-3
    assert config.train.steps == 7
    assert config.eval.datasets == ("glyphs",)
    assert config.data.crop == (0.5, 0.75)
    assert architecture(config.model).vision.width == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.peek_lr=1"], "config.optim has no key 'peek_lr'; its keys: beta1, beta2"),
        (["--config.optm.peak_lr=1"], "config has no key 'optm'; its keys: checkpoint, data, eval"),
        (
            ["--config.seed=1", "--config.model.vision.widht", "9"],
            "no key 'widht'; its keys: activ",
        ),
        (["--config.seed.more=1"], "config.seed has no key 'more'; its keys: none"),
        (["--config.train.steps=many"], "invalid literal for int"),
        (["--flag=1"], "Unknown command line flag 'flag'"),
        (["stray"], "unexpected arguments: stray"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_and_exits_with_2(
    parse, capsys, arguments, message
):
    with pytest.raises(SystemExit) as exit_:
        parse(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"), [(None, "--config=FILE is missing"), ("no/such.py", "no/such.py")]
)
def test_a_missing_recipe_is_answered_and_exits_with_2(parse, capsys, config, message):
    with pytest.raises(SystemExit) as exit_:
        parse(config=config)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_says_how_to_run_it_and_only_sets_keys_there_are(path):
    module = load(path)
    for part in ("python train.py --config=configs/" + path.name, "Hardware", "Time", "Result"):
        assert part in module.__doc__
    config, default = module.get_config(), default_config()

    def keys(section, prefix=""):
        for key, value in section.items():
            yield prefix + key
            if hasattr(value, "items"):
                yield from keys(value, f"{prefix}{key}.")

    assert set(keys(config)) == set(keys(default))
    architecture(config.model)


@pytest.mark.parametrize(
    ("recipe", "name", "peak_lr"),
    [
        ("rn50", "RN50", 5e-4),
        ("rn101", "RN101", 5e-4),
        ("rn50x4", "RN50x4", 5e-4),
        ("rn50x16", "RN50x16", 4e-4),
        ("rn50x64", "RN50x64", 3.6e-4),
        ("vitb32", "ViT-B/32", 5e-4),
        ("vitb16", "ViT-B/16", 5e-4),
        ("vitl14", "ViT-L/14", 4e-4),
        ("vitl14_336", "ViT-L/14@336px", 2e-5),
    ],
)
def test_the_papers_recipes_have_the_papers_numbers(recipe, name, peak_lr):
    config = load(Path(__file__).parent.parent / "configs" / f"{recipe}.py").get_config()
    assert config.model.name == name
    assert architecture(config.model) == model_config(name)
    assert config.train.batch_size == 32_768
    assert config.train.max_logit_scale == 100
    optim = config.optim
    beta2, eps = (0.999, 1e-8) if name.startswith("RN") else (0.98, 1e-6)
    assert (optim.peak_lr, optim.beta1, optim.beta2, optim.eps) == (peak_lr, 0.9, beta2, eps)
    assert (optim.weight_decay, optim.warmup_steps) == (0.2, 2_000)
    epochs = 1 if recipe == "vitl14_336" else 32
    assert config.train.steps * config.train.batch_size == pytest.approx(epochs * 400e6, rel=1e-4)
    assert tuple(config.data.crop) == (1.0, 1.0)


def test_an_unknown_model_name_is_answered_with_the_names():
    config = default_config()
    config.model.name = "ViT-B/17"
    with pytest.raises(ConfigError, match="did you mean 'ViT-B/1"):
        architecture(config.model)


def test_the_layers_of_a_resnet_and_of_a_vit_can_be_set(parse):
    name = "--config.model.name=RN50"
    config = parse(
        name, "--config.model.vision.layers=(1, 1, 2, 1)", "--config.model.text.width=64"
    )
    assert architecture(config.model).vision.layers == (1, 1, 2, 1)
    assert architecture(parse("--config.model.vision.layers=3").model).vision.layers == 3


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        (
            "RN50",
            "vision",
            {"patch_size": 8},
            "patch_size: RN50 has no such field, only image_size",
        ),
        ("ViT-B/16", "vision", {"pool": "max"}, "pool='max': choose one of class, mean, map"),
        ("ViT-B/16", "text", {"activation": "relu"}, "'relu': choose one of quick_gelu, gelu"),
    ],
)
def test_a_field_or_a_choice_that_the_tower_does_not_have_is_refused(name, part, change, message):
    config = default_config()
    config.model.name = name
    config.model[part].update(change)
    with pytest.raises(ConfigError, match=message):
        architecture(config.model)
