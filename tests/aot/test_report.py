"""Bounds and reports, where they can be computed by hand."""

import json
from types import SimpleNamespace

import pytest

from clip_jax.aot import advice, topology
from clip_jax.aot.cost import Collective
from clip_jax.aot.memory import Memory
from clip_jax.aot.report import Report, bounds, exchanges
from clip_jax.aot.topology import Topology, get_topology
from clip_jax.chips import CHIPS
from clip_jax.errors import ConfigError, OutOfMemoryError

V5E = next(chip for chip in CHIPS if chip.name == "v5e")


def devices(x, y, slices=1):
    return [
        SimpleNamespace(coords=(i, j, 0), slice_index=number)
        for number in range(slices)
        for i in range(x)
        for j in range(y)
    ]


def all_reduce(members, size=8e9):
    return Collective("all-reduce", ("data",), len(members), int(size), 1, False, tuple(members))


def test_each_bound_is_work_over_the_published_peak():
    where = Topology("v5e:4x4", V5E, devices(4, 4), 1)
    found = bounds(where, where.devices, 197 * 10**12, 819 * 10**8, [])
    assert found.matrix_units == pytest.approx(1)
    assert found.memory == pytest.approx(0.1)
    assert found.interconnect == 0
    assert found.step == found.matrix_units


def test_an_exchange_goes_over_the_links_of_the_axes_that_it_lies_along():
    where = Topology("v5e:4x4", V5E, devices(4, 4), 1)

    def seconds(members):
        return bounds(where, where.devices, 0, 0, [all_reduce(members)]).interconnect

    # 8 GB, twice (n - 1) / n of it sent, over links of 50 GB/s: four on a plane, two on a line.
    assert seconds(range(16)) == pytest.approx(2 * 8 * 15 / 16 / 200)
    assert seconds(range(4)) == pytest.approx(2 * 8 * 3 / 4 / 100)


def test_between_slices_each_chip_sends_its_share_over_the_network():
    both = devices(4, 4, slices=2)
    where = Topology("v5e:4x4*2", V5E, both, 2)
    collective = all_reduce(range(32))
    inside, network = 2 * 8 * 15 / 16 / 200, 2 * (8 / 16) / 2 / 3.125
    found = bounds(where, both, 0, 0, [collective])
    assert found.interconnect == pytest.approx(max(inside, network))
    (exchange,) = exchanges([collective], both)
    assert exchange.network
    assert not exchanges([all_reduce(range(16))], both)[0].network


def report(**changes):
    where = Topology("v5e:4x4", V5E, devices(4, 4), 1)
    common = {
        "config": "configs/vitb16.py", "model": "ViT-B/16", "topology": where,
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1}, "batch_size": 1600, "accumulate": 1,
        "remat": "none", "limit": 16 * 10**9, "peak": 20 * 10**9, "compile_seconds": 2.0,
    }  # fmt: skip
    return Report(**common | changes)


def fitting():
    where = Topology("v5e:4x4", V5E, devices(4, 4), 1)
    collective = all_reduce(range(16))
    return report(
        peak=15,
        memory=Memory(1, 2, 3, 4, 5, 0),
        model_flops=197 * 10**10,
        matmul_flops=197 * 10**10 * 5 // 4,
        traffic=819 * 10**7,
        exchanges=exchanges([collective], where.devices),
        bounds=bounds(where, where.devices, 197 * 10**10 * 5 // 4, 819 * 10**7, [collective]),
        steps=3600,
    )


def test_what_fits_has_bounds_and_what_follows_from_them():
    found = json.loads(json.dumps(fitting().to_dict()))
    assert found["recompute_ratio"] == 1.25
    seconds = 2 * 8 * 15 / 16 / 200  # the links'
    assert found["mfu_bound"] == pytest.approx(0.01 / seconds)
    assert found["examples_per_second_per_chip_bound"] == pytest.approx(100 / seconds)
    assert found["hours_bound"] == pytest.approx(seconds)
    assert found["chip_hours_bound"] == pytest.approx(16 * seconds)
    assert sum(found["memory_bytes_per_chip"].values()) == found["peak_bytes_per_chip"]


def test_the_keys_of_the_json_stay():
    always = {
        "config", "model", "topology", "chip", "chips", "slices", "mesh", "batch_size",
        "accumulate", "remat", "fits", "peak_bytes_per_chip", "limit_bytes_per_chip",
        "compile_seconds",
    }  # fmt: skip
    assert set(report().to_dict()) == always | {"largest_arrays", "smallest_change"}
    assert set(fitting().to_dict()) == always | {
        "memory_bytes_per_chip", "model_flops_per_chip", "matmul_flops_per_chip", "recompute_ratio",
        "memory_traffic_bytes_per_chip", "collectives", "bound_seconds", "mfu_bound",
        "examples_per_second_per_chip_bound", "steps", "hours_bound", "chip_hours_bound",
    }  # fmt: skip


def test_a_refusal_says_by_how_much_and_what_to_change():
    text = report(largest_arrays=("a large one",), change="--config.train.remat=full").to_text()
    assert "does not fit: 20.00 GB of 16.00 GB a chip, 4.00 GB too much" in text
    assert "a large one" in text
    assert "smallest change that fits: --config.train.remat=full" in text


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v9:4x4", "16x16", "v5e:4x4*", "v5e-256"])
def test_a_topology_that_there_is_not_is_answered_with_those_that_there_are(name):
    with pytest.raises(ConfigError, match="such as v4:8x8x4, v5e:16x16, v5p:8x8x8, v6e:16x16"):
        get_topology(name)


def test_a_missing_compiler_is_answered_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'clip-nnx\[tpu\]'"):
        get_topology("v5e:4x4")


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        ({"train.remat": "dots"}, "--config.train.remat=dots"),
        (
            {"train.remat": "full", "mesh.fsdp": 4},
            "--config.train.remat=full --config.mesh.fsdp=4",
        ),
        (
            {"train.remat": "full", "train.accumulate": 2},
            "--config.train.remat=full --config.train.accumulate=2",
        ),
        ({"train.steps": 0}, "take more chips, or chips with more memory"),
    ],
)
def test_the_advice_is_the_first_change_that_compiles(small_config, monkeypatch, fits, expected):
    def compile_of(config, mesh):
        def compile():
            for key, value in fits.items():
                section, _, name = key.partition(".")
                if config[section][name] != value:
                    raise OutOfMemoryError("HBM")

        return SimpleNamespace(compile=compile)

    monkeypatch.setattr(advice, "make_program", compile_of)
    monkeypatch.setattr(advice, "make_mesh", lambda *_: None)
    where = Topology("v5e:4x4", V5E, devices(4, 4), 1)
    small_config.lock()
    assert advice.smallest_change(small_config, where, "none").endswith(expected)
    assert small_config.train.remat == "dots"
