"""Whole runs: what they leave behind, what they survive, how they end when they cannot go on."""

import json
import os
import signal

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.checkpoint import load_params
from clip_jax.convert import convert
from clip_jax.errors import CheckpointError, ConfigError, DataError
from clip_jax.training.loop import Interrupted, train
from clip_jax.training.metrics import read_metrics


class Stop(Exception):
    """Stands for a crash in the middle of a run."""


def crash(model, preprocess, mesh):
    raise Stop


def weights(result):
    from flax import nnx

    return jax.device_get(nnx.to_pure_dict(nnx.state(result.model)))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def test_a_run_leaves_metrics_checkpoints_and_a_model_that_loads(small_config, tmp_path):
    result = train(small_config, str(tmp_path), {"fixed": lambda *_: {"score": 0.25}})
    assert result.metrics == {"fixed/score": 0.25}
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[-1] == {"step": 12, "fixed/score": 0.25}
    assert "examples_per_second" in lines[5]
    assert 0 <= lines[5]["data_wait"] <= 1
    assert list((tmp_path / "tensorboard").iterdir())
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 12]

    model, preprocess = clip_jax.load(tmp_path)
    assert model.config == result.model.config
    assert preprocess == result.preprocess
    images = np.ones((2, 16, 16, 3), np.float32)
    np.testing.assert_allclose(
        model.encode_image(images), result.model.encode_image(images), atol=1e-6
    )


def test_a_relative_workdir_is_one_of_the_folder_it_was_started_in(
    small_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    whole = train(small_config, "runs/first")
    again = train(small_config, "runs/first")  # restores, from the same relative path
    assert_same(weights(whole), weights(again))
    assert (tmp_path / "runs" / "first" / "checkpoints" / "12").is_dir()
    model, _ = clip_jax.load("runs/first")
    assert model.config == whole.model.config


@pytest.mark.parametrize("at", [3, 4, 9])  # before, at and after a checkpoint (every 4 steps)
def test_a_run_that_crashed_goes_on_as_if_nothing_had_happened(small_config, tmp_path, at):
    whole = train(small_config, str(tmp_path / "whole"))
    small_config.eval.every = at
    with pytest.raises(Stop):
        train(small_config, str(tmp_path / "broken"), {"crash": crash})
    assert max(losses(tmp_path / "broken")) == at
    small_config.eval.every = 0
    resumed = train(small_config, str(tmp_path / "broken"))
    assert_same(weights(whole), weights(resumed))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_finished_run_is_not_trained_again(small_config, tmp_path):
    first = train(small_config, str(tmp_path))
    again = train(small_config, str(tmp_path), {"fixed": lambda *_: {"score": 1.0}})
    assert_same(weights(first), weights(again))
    assert again.metrics == {"fixed/score": 1.0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_its_status(small_config, tmp_path, number):
    whole = train(small_config, str(tmp_path / "whole"))
    small_config.eval.every = 5
    with pytest.raises(Interrupted) as interrupted:
        train(
            small_config,
            str(tmp_path / "stopped"),
            {"signal": lambda *_: (os.kill(os.getpid(), number), {})[1]},
        )
    assert interrupted.value.code == 128 + number
    assert (tmp_path / "stopped" / "checkpoints" / "6").is_dir()  # the step it was in
    small_config.eval.every = 0
    assert_same(weights(whole), weights(train(small_config, str(tmp_path / "stopped"))))


@pytest.mark.parametrize("part", ["params", "optimizer"])
def test_a_damaged_newest_checkpoint_falls_back_and_loses_nothing(
    small_config, tmp_path, part, caplog
):
    whole = train(small_config, str(tmp_path))
    newest = tmp_path / "checkpoints" / "12"
    damaged = [path for path in (newest / part).rglob("*") if path.is_file() and "d" in path.parts]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:10])
    resumed = train(small_config, str(tmp_path))
    assert "12 cannot be read" in caplog.text
    assert "falling back to an older checkpoint" in caplog.text
    assert_same(weights(whole), weights(resumed))
    assert (tmp_path / "checkpoints.unreadable" / "12" / part).is_dir()
    assert (tmp_path / "checkpoints" / "12").is_dir()  # made again


def test_without_a_readable_checkpoint_it_stops_and_touches_nothing(small_config, tmp_path):
    train(small_config, str(tmp_path))
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and "params" in path.parts:
            path.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be read.*12: .*8: .*4: "):
        train(small_config, str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_half_written_checkpoint_is_passed_over(small_config, tmp_path):
    whole = train(small_config, str(tmp_path))
    newest = tmp_path / "checkpoints" / "12"
    newest.rename(newest.with_name("12.orbax-checkpoint-tmp"))
    assert_same(weights(whole), weights(train(small_config, str(tmp_path))))


def test_a_workdir_of_another_model_is_refused_with_the_differences(small_config, tmp_path):
    train(small_config, str(tmp_path))
    small_config.model.vision.width = 64
    with pytest.raises(
        CheckpointError, match=r"holds another model(?s:.*)model.vision.width: 32 there, 64 in this"
    ):
        train(small_config, str(tmp_path))


def test_a_workdir_of_another_data_order_is_refused(small_config, tmp_path):
    train(small_config, str(tmp_path))
    small_config.seed = 5
    with pytest.raises(DataError, match="seed: 0 there, 5 now"):
        train(small_config, str(tmp_path))


def test_a_batch_that_the_devices_do_not_divide_is_refused(small_config, tmp_path):
    small_config.train.batch_size = 20
    with pytest.raises(ConfigError, match="batch_size=20 is not a multiple of 8"):
        train(small_config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(small_config, tmp_path):
    small_config.optim.peak_lr = 1e30
    small_config.optim.warmup_steps = 0
    with pytest.raises(
        FloatingPointError, match=r"loss is \w+ at step .*lower config.optim.peak_lr"
    ):
        train(small_config, str(tmp_path))


def test_it_starts_from_the_weights_of_another_run_at_another_resolution(small_config, tmp_path):
    small_config.train.steps = 4
    first = train(small_config, str(tmp_path / "first"))
    small_config.train.init_from = str(tmp_path / "first")
    small_config.model.vision.image_size = 24
    small_config.optim.update(peak_lr=0.0, weight_decay=0.0)
    second = train(small_config, str(tmp_path / "second"))
    before, after = weights(first), weights(second)
    assert before["visual"].pop("position_embedding").shape == (5, 32)
    assert after["visual"].pop("position_embedding").shape == (10, 32)
    assert_same(before, after)


def test_weights_that_do_not_fit_are_refused(small_config, tmp_path):
    small_config.train.steps = 4
    train(small_config, str(tmp_path / "first"))
    small_config.train.init_from = str(tmp_path / "first")
    small_config.model.text.layers = 2
    with pytest.raises(CheckpointError, match=r"do not fit(?s:.*)model.text.layers: 1 there, 2 he"):
        train(small_config, str(tmp_path / "second"))


def test_it_starts_from_the_weights_of_another_program(small_config, tmp_path):
    small_config.train.steps = 3
    first = train(small_config, str(tmp_path / "first"))
    convert(tmp_path / "first", tmp_path / "theirs", "open_clip")
    small_config.train.init_from = str(tmp_path / "theirs")
    small_config.optim.update(peak_lr=0.0, weight_decay=0.0)
    assert_same(weights(first), weights(train(small_config, str(tmp_path / "second"))))


def test_the_checkpoint_describes_itself(small_config, tmp_path):
    train(small_config, str(tmp_path))
    text = (tmp_path / "checkpoints" / "12" / "_CHECKPOINT_METADATA").read_text()
    card = json.loads(text)["custom_metadata"]["card"]
    assert card["model"]["vision"]["activation"] == "quick_gelu"
    assert card["preprocess"]["size"] == 16
    assert card["tokenizer"]["kind"] == "clip"
    assert card["config"]["optim"]["peak_lr"] == 1e-3
    assert set(card["versions"]) >= {"clip_jax", "jax", "flax", "optax", "orbax-checkpoint"}


def test_an_unfinished_last_line_of_the_log_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("path", ["nothing", "empty"])
def test_loading_what_is_no_checkpoint_says_what_was_expected(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*expected a workdir"):
        load_params(tmp_path / path)
