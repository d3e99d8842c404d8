from types import SimpleNamespace

import jax
import pytest

from clip_jax.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(device_kind, name):
    chip = chip_of(SimpleNamespace(device_kind=device_kind))
    assert chip.name == name


def test_a_cpu_has_no_published_peak():
    assert chip_of(jax.devices()[0]) is None


def test_a_ring_of_chips_is_slower_than_their_memory_and_that_than_their_units():
    for chip in CHIPS:
        assert chip.links * chip.link_bandwidth < chip.memory_bandwidth < chip.peak_flops / 50
