"""The commands as a person runs them, each in a process of its own."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A quickstart of seconds: a smaller model, fewer steps; the same data, evaluation and report.
SMALL = [
    "--config.train.steps=60",
    "--config.train.batch_size=64",
    "--config.optim.warmup_steps=10",
    "--config.checkpoint.every=20",
    "--config.model.vision.width=32",
    "--config.model.vision.layers=1",
    "--config.model.text.width=32",
    "--config.train.unroll=1",
]


def command(*arguments, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finished(process, status=0, timeout=400):
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from clip_jax.data import glyphs

    directory = tmp_path_factory.mktemp("tfds")
    glyphs.prepare(directory)
    return directory


def quickstart(workdir, data_dir):
    recipe = "--config=configs/quickstart.py"
    return command(
        "train.py", recipe, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", *SMALL
    )


def figures(output):
    return re.findall(r"^(glyphs/\S+)\s+([\d.]+) %$", output, re.MULTILINE)


def evaluated(directory, data_dir, *arguments):
    """What clip_jax.eval says of the run in `whole`, and the rows that it leaves."""
    results = directory / "results"
    model, data = f"--model={directory / 'whole'}", f"--data_dir={data_dir}"
    output = finished(command("-m", "clip_jax.eval", model, data, f"--out={results}", *arguments))
    lines = (results / "results.json").read_text().splitlines()
    return output, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_the_quickstart_killed_at_a_random_moment_ends_with_the_same_figures(tmp_path, data_dir):
    whole = finished(quickstart(tmp_path / "whole", data_dir))
    assert len(figures(whole)) == 9
    for picture in ("training_curves", "glyphs_similarity", "glyphs_predictions"):
        assert (tmp_path / "whole" / "plots" / f"{picture}.png").stat().st_size > 5_000
    assert "clip_jax.load" in whole
    assert not re.search(r"^[IW]\d{4} ", whole, re.MULTILINE)  # the libraries keep quiet

    process = quickstart(tmp_path / "killed", data_dir)
    log = tmp_path / "killed" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(random.uniform(0, 6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert figures(finished(quickstart(tmp_path / "killed", data_dir))) == figures(whole)

    output, rows = evaluated(tmp_path, data_dir, "--dataset=glyphs,glyph_captions,glyph_groups")
    others = {row["dataset"]: row["metrics"] for row in rows if row["dataset"] != "glyphs"}
    assert 0 < others["glyph_captions"]["acc"] < 1
    assert set(others["glyph_groups"]) == {"script_acc", "family_acc"}
    rows = [row for row in rows if row["dataset"] == "glyphs"]
    assert {row["task"] for row in rows} == {"zeroshot_classification", "zeroshot_retrieval"}
    assert set(rows[0]) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    found = {f"glyphs/{k}": f"{100 * v:.2f}" for row in rows for k, v in row["metrics"].items()}
    assert found == {k: f"{float(v):.2f}" for k, v in figures(whole)}
    assert "acc1" in output

    tasks = "--task=zero_shot,linear_probe,few_shot"
    output, rows = evaluated(tmp_path, data_dir, "--dataset=glyph_faces", tasks)
    faces = {row["task"]: row["metrics"] for row in rows if row["dataset"] == "glyph_faces"}
    assert set(faces) == {"zeroshot_classification", "linear_probe", "few_shot"}
    assert faces["linear_probe"]["lp_acc1"] > 2 / 16  # of sixteen faces


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_exits_with_130(tmp_path, data_dir):
    process = quickstart(tmp_path, data_dir)
    log = tmp_path / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = finished(process, status=130)
    assert re.search(r"stopped and saved at step \d+; the same command goes on", output)
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.libtpu
def test_aot_keeps_the_most_that_fits(tmp_path, v5e_pod):
    """With dots the compiler refuses this step: it would take more than the chip has."""
    arguments = ["--config=configs/vitb32.py", "--topology=v5e:2x2", f"--json={tmp_path}/report"]
    arguments += ["--config.train.remat=auto", "--config.train.batch_size=1536"]
    arguments += ["--config.model.vision.layers=40", "--config.model.text.layers=1"]
    output = finished(command("-m", "clip_jax.aot", *arguments, "--config.data.resize=host"))
    assert "batch 1,536, remat dots_no_hidden\n  fits: " in output
    report = json.loads((tmp_path / "report").read_text())
    assert (report["fits"], report["remat"]) == (True, "dots_no_hidden")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [
                "train.py",
                "--config=configs/vitb32.py",
                "--config.data.train=no/such/{0..9}.tfrecord",
            ],
            "DataError: no shard matches no/such/0.tfrecord",
        ),
        (["train.py", "--config=configs/vitb32.py"], "DataError: no data: set config.data.train"),
        (
            ["train.py", "--config=configs/quickstart.py", "--config.model.name=ViT-B-16"],
            "ConfigError: no model named 'ViT-B-16'; did you mean 'ViT-B/16'?",
        ),
        (
            ["-m", "clip_jax.eval", "--model=no/such/workdir", "--dataset=glyphs"],
            "WeightsError: nothing at no/such/workdir",
        ),
        (
            ["-m", "clip_jax.aot", "--config=configs/vitb32.py", "--topology=v5e:one"],
            "ConfigError: topology 'v5e:one': expected VERSION:SHAPE",
        ),
    ],
)
def test_what_cannot_work_ends_with_a_message_and_status_1(tmp_path, arguments, message):
    workdir = [f"--workdir={tmp_path}"] if arguments[0] == "train.py" else []
    output = finished(command(*arguments, *workdir), status=1)
    assert message in output
    assert "Traceback" not in output
