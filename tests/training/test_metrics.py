from types import SimpleNamespace

import jax
import pytest

from clip_jax.training.metrics import speed


def test_model_flops_utilisation_is_the_share_of_all_chips_peak():
    chips = [SimpleNamespace(device_kind="TPU v5 lite")] * 4  # 197 TFLOP/s each
    values = speed(8_000.0, 40_000_000_000, chips)
    assert values["examples_per_second"] == 8_000
    assert values["examples_per_second_per_chip"] == 2_000
    assert values["mfu"] == pytest.approx(2_000 * 40e9 / 197e12)


def test_a_cpu_has_no_utilisation():
    assert set(speed(10.0, 1, jax.devices())) == {
        "examples_per_second",
        "examples_per_second_per_chip",
    }
