"""A small step compiled for TPUs that are not there, against what it was when it was recorded."""

import importlib
import json

import pytest

from clip_jax.aot.compile import report_on

# What the compiler of libtpu 0.0.42 makes of it. A change that moves them on purpose records them
# anew and says in its commit why.
PEAK = 249103360
TOLERANCE = 0.1  # of bytes; counts must be equal
COLLECTIVES = {  # both sides' embeddings, peak and total of both; gradients and the loss's scalars
    "all-gather": {"count": 6, "bytes": 2 * 2 * 1024 * 128 + 4 * 4 * 1024},
    "all-reduce": {"count": 1, "bytes": 29.8e6},
}


def small_step():
    """The quickstart's model in bfloat16 with the paper's optimizer, 1,024 pairs."""
    config = importlib.import_module("configs.quickstart").get_config()
    config.train.update(batch_size=1024, dtype="bfloat16", unroll=1)
    config.optim.name = "adamw"  # Muon's own products are none of the model's
    config.data.resize = "host"  # nor are those of the resize, a tenth of so small a model's
    return config


# Of three layers of ViT-B/16 and of its text tower, 512 pairs on four chips. Two whole layers were
# 11.6 GB, 15.8 where attention computed the scores of all rows at once, 20.0 where, too, products
# were kept as matrices of all rows, which a TPU lays out in another way.
TRAFFIC = 11.6e9


@pytest.fixture(scope="module")
def report(v5e_pod, tmp_path_factory):
    """On four chips."""
    hlo = tmp_path_factory.mktemp("hlo") / "step.txt"
    found = report_on(small_step(), "v5e:2x2", hlo=hlo)
    assert hlo.read_text().startswith("HloModule")
    return found


@pytest.mark.slow
@pytest.mark.libtpu
def test_the_memory_is_what_it_was(report):
    assert report.fits
    assert report.peak == pytest.approx(PEAK, rel=TOLERANCE)
    assert report.memory.parameters == 29_805_572  # float32, on every chip; the moments twice that
    assert report.memory.optimizer == pytest.approx(2 * report.memory.parameters, rel=0.01)
    assert report.memory.peak == report.peak
    assert report.memory.temporaries > 0


@pytest.mark.slow
@pytest.mark.libtpu
def test_what_is_sent_is_what_it_was(report):
    assert {each.kind for each in report.exchanges} == set(COLLECTIVES)
    for each in report.exchanges:
        expected = COLLECTIVES[each.kind]
        assert (each.axes, each.count, each.runs) == (("data",), *2 * (expected["count"],))
        assert each.bytes == pytest.approx(expected["bytes"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.libtpu
def test_nothing_is_recomputed_and_the_report_is_plain_data(report):
    assert report.recompute_ratio == pytest.approx(1, abs=0.03)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["fits"] is True
    assert 0 < found["mfu_bound"] < 1
    assert max(found["bound_seconds"].values()) * found["mfu_bound"] == pytest.approx(
        found["model_flops_per_chip"] / 197e12
    )
    assert "fits: 0.25 GB" in report.to_text()


@pytest.mark.slow
@pytest.mark.libtpu
def test_no_more_passes_through_memory_than_did(v5e_pod):
    config = importlib.import_module("configs.vitb16").get_config()
    config.train.batch_size = 512
    config.data.resize = "host"
    config.model.vision.layers = config.model.text.layers = 3
    found = report_on(config, "v5e:2x2").to_dict()
    assert found["memory_traffic_bytes_per_chip"] == pytest.approx(TRAFFIC, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.libtpu
def test_two_slices_share_out_the_sum_of_their_gradients(v5e_pod):
    two = report_on(small_step(), "v5e:2x2*2")
    assert two.fits
    assert (two.topology.slices, len(two.topology.devices)) == (2, 8)
    # Each chip of a slice sums a share, exchanges it with the other slice and hands it round.
    (shares,) = [each for each in two.exchanges if each.kind == "reduce-scatter"]
    gradients = pytest.approx(COLLECTIVES["all-reduce"]["bytes"], rel=TOLERANCE)
    assert (shares.axes, shares.network, shares.bytes) == (("data",), False, gradients)
    (exchanged,) = [each for each in two.exchanges if each.network and each.kind == "all-reduce"]
    assert (exchanged.axes, 4 * exchanged.bytes) == (("data",), gradients)
    assert two.bounds.interconnect >= exchanged.sent / two.topology.chip.network_bandwidth
