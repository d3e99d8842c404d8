"""Several processes on one machine, as the hosts of a pod are: gloo carries the collectives."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "one_process.py"
SECONDS = 300  # of patience with a busy machine; the test takes a fifth of it


def processes(count, save_to="-", restore_from="-"):
    """What each of `count` processes printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, (index, count, port, save_to, restore_from))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


@pytest.mark.slow
def test_two_and_four_processes_train_as_one_and_share_checkpoints(tmp_path):
    spec = importlib.util.spec_from_file_location("one_process", SCRIPT)
    one_process = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one_process)

    by_four = processes(4, save_to=tmp_path / "four")
    by_two = processes(2, restore_from=tmp_path / "four")
    alone = one_process.train(jax.devices()[:4], restore_from=tmp_path / "four")
    for each in (*by_four, *by_two):
        np.testing.assert_allclose(each["losses"], alone["losses"], rtol=1e-5)
    assert alone["losses"][-1] < alone["losses"][0]
    for each in (*by_two, alone):  # four processes saved; two, and one, go on
        np.testing.assert_allclose(each["restored"], alone["losses"][2:], rtol=1e-5)
