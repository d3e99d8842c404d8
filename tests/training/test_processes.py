"""The same losses from one process, two and four, and checkpoints that any number of them reads."""

import jax
import numpy as np
import pytest

from tests.hosts import run_as_hosts
from tests.training import one_process


@pytest.mark.slow
def test_two_and_four_processes_train_as_one_and_share_checkpoints(tmp_path):
    by_four = run_as_hosts(one_process.__file__, 4, tmp_path / "four", "-")
    by_two = run_as_hosts(one_process.__file__, 2, "-", tmp_path / "four")
    alone = one_process.train(jax.devices()[:4], restore_from=tmp_path / "four")
    for each in (*by_four, *by_two):
        np.testing.assert_allclose(each["losses"], alone["losses"], rtol=1e-5)
    assert alone["losses"][-1] < alone["losses"][0]
    for each in (*by_two, alone):  # four processes saved; two, and one, go on
        np.testing.assert_allclose(each["restored"], alone["losses"][2:], rtol=1e-5)
