"""Training batches end to end: from shards on disk to arrays, resumed, shared out and damaged."""

import itertools
import json
import os

import jax
import numpy as np
import pytest

from clip_jax.config import default_config
from clip_jax.data.batches import train_batches
from clip_jax.data.order import Order
from clip_jax.data.sources import open_mixture
from clip_jax.errors import DataError
from clip_jax.resize import crop_resize
from clip_jax.tokenizer import tokenize
from tests.data.records import (
    TinyImages,
    encode,
    pair,
    photograph,
    prepare,
    write_pairs,
    write_tar,
)

LENGTHS = (4, 3, 5, 2, 4, 3, 6, 3)
PAIRS = sum(LENGTHS)
SIZE = 16
CONTEXT = 12
BATCH = 8
STREAMS = 4
BATCHES = 12  # two epochs of every stream, and more of most
DAMAGE = {2: {"jpg": b"no picture"}, 9: {"txt": b""}, 17: {"jpg": b""}, 18: {"txt": b"caf\xe9"}}


def make_config(**data):
    config = default_config()
    config.train.batch_size = BATCH
    config.data.update(
        crop=(0.5, 1.0), streams=STREAMS, shuffle_bytes=40_000, max_bad=0.5, color_jitter_prob=1.0
    )
    config.data.update(data)
    return config


def start(mixture, config):
    return Order.start(mixture, config.seed, config.data.streams, config.data.shuffle_bytes)


def take(count, config, order=None, *, on_device=False):
    mixture = open_mixture(config.data.train, config.data)
    fresh = start(mixture, config)
    order = fresh if order is None else fresh.resume(json.loads(json.dumps(order.to_dict())))
    batches = train_batches(mixture, order, config, SIZE, CONTEXT, on_device=on_device)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.tokens, other.tokens)


def plain(taken):
    return [each.batch for each in taken]


@pytest.fixture(scope="module", params=["sound", "damaged", "mixed"])
def run(request, tmp_path_factory):
    """A configuration, and what a run gives that nothing disturbs."""
    directory = tmp_path_factory.mktemp("pairs")
    damage = {} if request.param == "sound" else DAMAGE
    config = make_config(train=write_pairs(directory / "a", LENGTHS, damage))
    if request.param == "mixed":
        for shard in range(2):
            samples = {}
            for n in range(shard * 9, shard * 9 + 9):
                picture, caption = pair(n)
                samples[f"{n:03d}"] = {"png": picture, "txt": b"tar " + caption}
            write_tar(directory / f"{shard}.tar", samples)
        path = directory / "1.tar"
        os.truncate(path, path.stat().st_size * 2 // 3)  # within a sample
        config.data.train = [(config.data.train, 3), (f"{directory}/{{0..1}}.tar", 1.0)]
        config.data.update(
            resized_crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), gray_prob=0.2
        )
    return config, take(BATCHES, config)


def test_batches_are_uint8_pictures_and_int32_tokens(run):
    for batch in plain(run[1]):
        assert batch.image.shape == (BATCH, SIZE, SIZE, 3)
        assert batch.image.dtype == np.uint8
        assert batch.tokens.shape == (BATCH, CONTEXT)
        assert batch.tokens.dtype == np.int32


@pytest.mark.parametrize("done", [1, 6])
def test_resuming_gives_the_same_batches_bit_for_bit(run, done):
    config, undisturbed = run
    resumed = take(BATCHES - done, config, undisturbed[done - 1].order)
    assert_same(plain(resumed), plain(undisturbed[done:]))
    assert [each.order for each in resumed] == [each.order for each in undisturbed[done:]]


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_rows_make_up_the_batch(run, hosts, monkeypatch):
    config, undisturbed = run
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    parts = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        parts.append(take(6, config, undisturbed[1].order))
    together = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch for part in batch))
        for batch in zip(*parts, strict=True)
    ]
    assert_same(together, plain(undisturbed[2:8]))
    places = np.array([part[-1].order.places for part in parts])
    assert parts[0][-1].order.merged(places) == undisturbed[7].order


def rows_of(taken):
    return [
        (tokens.tobytes(), image.tobytes())
        for batch in plain(taken)
        for image, tokens in zip(batch.image, batch.tokens, strict=True)
    ]


def expected_tokens(numbers, prefix=""):
    captions = [prefix + pair(n)[1].decode() for n in numbers]
    return {tokens.tobytes() for tokens in tokenize(captions, CONTEXT, truncate=True)}


def test_every_good_pair_comes_and_no_bad_one(run):
    config, undisturbed = run
    seen = {tokens for tokens, _ in rows_of(undisturbed)}
    if isinstance(config.data.train, str):
        bad = undisturbed[-1].faults.counts()
        good = set(range(PAIRS)) - (DAMAGE.keys() if bad else set())
        mended = {tokenize(["caf\ufffd"], CONTEXT).tobytes()} if bad else set()
        assert seen == expected_tokens(good) | mended


def test_what_was_bad_is_counted_by_kind(run):
    config, undisturbed = run
    kinds = {"undecodable_image", "missing_caption", "empty_image", "invalid_utf8"}
    if isinstance(config.data.train, list):
        kinds |= {"truncated_shard"}
    elif not undisturbed[-1].faults.counts():
        kinds = set()
    assert undisturbed[-1].faults.counts().keys() == kinds


def test_a_pair_is_cropped_anew_in_every_epoch(run):
    _, undisturbed = run
    crops = {}
    for tokens, image in rows_of(undisturbed):
        crops.setdefault(tokens, []).append(image)
    # Two crops of pictures of some twenty pixels may be the same by chance.
    assert sum(len(seen) - len(set(seen)) for seen in crops.values()) <= 2
    assert max(map(len, crops.values())) >= 2


def test_pictures_left_to_the_device_become_what_the_host_makes_of_them(tmp_path):
    config = make_config(train=write_pairs(tmp_path / "a", LENGTHS), resized_crop=(0.3, 1.0))
    on_host = plain(take(3, config))
    for host, device in zip(on_host, plain(take(3, config, on_device=True)), strict=True):
        np.testing.assert_array_equal(host.tokens, device.tokens)
        pixels = np.asarray(crop_resize(device.image, device.box, SIZE))
        difference = np.abs(pixels.astype(int) - host.image)
        assert difference.max() <= 1  # where rounding decides
        assert difference.mean() < 0.01


@pytest.mark.slow
def test_the_next_two_hundred_batches_after_any_kill_are_the_same(tmp_path):
    spec = write_pairs(tmp_path / "a", LENGTHS, DAMAGE)
    config = make_config(train=spec, shuffle_bytes=20_000)
    undisturbed = take(220, config)
    for done in (1, 20):
        resumed = take(200, config, undisturbed[done - 1].order)
        assert_same(plain(resumed), plain(undisturbed[done : done + 200]))


def test_weights_decide_how_often_a_source_comes(tmp_path):
    picture, _ = pair(0)
    for name, count in (("a", 3), ("b", 50)):
        write_tar(
            tmp_path / f"{name}.tar",
            {f"{n}": {"png": picture, "txt": name.encode()} for n in range(count)},
        )
    config = make_config(train=[(f"{tmp_path}/a.tar", 1), (f"{tmp_path}/b.tar", 3)], streams=1)
    config.train.batch_size = 50
    tokens = np.concatenate([each.batch.tokens for each in take(8, config)])
    share = (tokens == tokenize("a", CONTEXT)).all(1).mean()
    assert abs(share - 0.25) < 0.06


def test_captions_are_chosen_by_their_probabilities_among_those_that_have_words(tmp_path):
    picture, _ = pair(0)
    captions = {"txt": b"short", "json": b'{"alt": ["one", "", "two"]}'}
    write_tar(tmp_path / "0.tar", {f"{n}": {"png": picture} | captions for n in range(40)})
    config = make_config(train=f"{tmp_path}/0.tar", streams=1)
    config.data.captions = {"txt": 0.4, "json/alt": 0.6}
    config.train.batch_size = 200
    tokens = np.concatenate([each.batch.tokens for each in take(5, config)])
    shares = [(tokens == tokenize(text, CONTEXT)).all(1).mean() for text in ("short", "one", "two")]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.05)  # the empty one drops out
    config.data.captions = "json/alternative"
    with pytest.raises(DataError, match="missing_caption"):
        take(1, config)


def test_labels_become_captions_by_template(tmp_path):
    prepare(TinyImages, tmp_path, shards=2)
    config = make_config(train="tfds:tiny_images:train", data_dir=str(tmp_path), streams=2)
    config.data.templates = ("an {} number.", "{}")
    tokens = np.concatenate([each.batch.tokens for each in take(4, config)])
    texts = [t.format(n) for t in config.data.templates for n in ("even", "odd")]
    assert {row.tobytes() for row in tokens} == {row.tobytes() for row in tokenize(texts, CONTEXT)}


def test_what_has_neither_captions_nor_labels_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", {"0": {"png": pair(0)[0]}})
    with pytest.raises(DataError, match=r"0\.tar has neither captions nor labels with names"):
        take(1, make_config(train=f"{tmp_path}/0.tar"))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"jpg": b"no picture"}, "undecodable_image"),
        ({"jpg": encode(photograph(20, 20), "JPEG")[:-200]}, "undecodable_image"),
        ({"txt": "\u3000 \n".encode()}, "missing_caption"),
    ],
)
def test_a_run_stops_when_all_is_bad_instead_of_waiting_for_ever(tmp_path, changes, kind):
    spec = write_pairs(tmp_path / "a", (5, 5, 5, 5), dict.fromkeys(range(20), changes))
    with pytest.raises(
        DataError, match=rf"(?s){kind}.*more than config\.data\.max_bad=0\.5.*/a/0000"
    ):
        take(1, make_config(train=spec))


def test_a_run_stops_once_more_than_the_share_is_bad(tmp_path):
    spec = write_pairs(tmp_path / "a", (5,) * 4, {n: {"jpg": b""} for n in range(0, 20, 5)})
    assert len(take(40, make_config(train=spec, max_bad=0.25))) == 40
    with pytest.raises(DataError, match=r"empty_image.*max_bad=0\.15"):
        take(40, make_config(train=spec, max_bad=0.15))


def test_what_streams_and_batch_cannot_share_out_is_refused(tmp_path):
    config = make_config(train=write_pairs(tmp_path / "a", (4,)))
    config.train.batch_size = 5
    with pytest.raises(DataError, match=r"4 streams do not divide train\.batch_size=5"):
        take(1, config)
