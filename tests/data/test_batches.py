"""Batches end to end: from shards on disk to arrays, resumed, damaged, padded and prefetched."""

import itertools
import os
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.config import default_config
from clip_jax.data import images
from clip_jax.data.batches import Prefetch, eval_batches, train_batches
from clip_jax.data.order import Order, fold_in, ordered_records
from clip_jax.data.sources import open_source
from clip_jax.errors import DataError
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizer import tokenize
from tests.data.records import (
    TinyImages,
    encode,
    example,
    pair,
    photograph,
    prepare,
    write_pairs,
    write_shard,
)

LENGTHS = (4, 3, 5, 2)  # two streams of nine and of five pairs
PAIRS = sum(LENGTHS)
SIZE = 16
CONTEXT = 12
BATCH = 4
BATCHES = 10  # 20 pairs of each stream: more than two and four epochs


@pytest.fixture
def config():
    config = default_config()
    config.train.batch_size = BATCH
    config.data.update(crop=(0.5, 1.0), streams=2, shuffle_window=8)
    return config


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), LENGTHS)


@pytest.fixture
def source(spec, config):
    return open_source(spec, config.data)


def start(source, config):
    return Order.start(source, config.seed, config.data.streams, config.data.shuffle_window)


def take(count, source, config, order=None):
    batches = train_batches(source, order or start(source, config), config, SIZE, CONTEXT)
    return list(itertools.islice(batches, count))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.fixture(scope="module")
def undisturbed(spec):
    """What a run gives that nothing disturbs; with the settings of `config`."""
    config = default_config()
    config.train.batch_size = BATCH
    config.data.update(crop=(0.5, 1.0), streams=2, shuffle_window=8)
    return take(BATCHES, open_source(spec, config.data), config)


def test_rows_are_the_pairs_in_order_cropped_by_stream_and_ticket_alone(
    source, config, undisturbed
):
    # Record by record, hence without neighbours: what a row holds depends on nothing else.
    records = ordered_records(source, start(source, config), BATCH, 0, 1).take(BATCH * BATCHES)
    rows = [
        (image, tokens)
        for batch in undisturbed
        for image, tokens in zip(batch.image, batch.tokens, strict=True)
    ]
    captions, crops = [], []
    for record in records:
        features = source.parse(record["record"])
        seed = fold_in([config.seed, 1], record["stream"], record["ticket"])
        pixels = images.decode(features["image"])
        crops.append(images.random_square_crop(pixels, SIZE, config.data.crop, seed))
        captions.append(features["caption"].numpy().decode())
    np.testing.assert_array_equal([image for image, _ in rows], crops)
    expected = tokenize(captions, CONTEXT, truncate=True)
    np.testing.assert_array_equal([tokens for _, tokens in rows], expected)
    assert set(captions) == {pair(n)[1].decode() for n in range(PAIRS)}


def test_batches_are_uint8_pictures_and_int32_tokens(undisturbed):
    for batch in undisturbed:
        assert batch.image.shape == (BATCH, SIZE, SIZE, 3)
        assert batch.image.dtype == np.uint8
        assert batch.tokens.shape == (BATCH, CONTEXT)
        assert batch.tokens.dtype == np.int32


def test_a_pair_is_cropped_anew_in_every_epoch(undisturbed):
    crops = {}
    for batch in undisturbed:
        for image, tokens in zip(batch.image, batch.tokens, strict=True):
            crops.setdefault(tokens.tobytes(), []).append(image.tobytes())
    assert len(crops) == PAIRS
    assert all(len(set(seen)) == len(seen) >= 2 for seen in crops.values())


@pytest.mark.parametrize("done", [1, 7])
def test_resuming_gives_the_same_batches_bit_for_bit(source, config, undisturbed, done):
    saved = start(source, config).after(done, BATCH).to_dict()
    resumed = start(source, config).resume(saved)
    assert_same(take(BATCHES - done, source, config, resumed), undisturbed[done:])


def test_the_hosts_rows_make_up_the_batch(source, config, undisturbed, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        parts.append(take(5, source, config))
    together = [jax.tree.map(lambda *x: np.concatenate(x), *b) for b in zip(*parts, strict=True)]
    assert_same(together, undisturbed[:5])


def test_another_batch_size_crops_the_same_records_alike(source, config, undisturbed):
    config.train.batch_size = 2
    for small, batch in zip(
        [take(4, source, config)[i : i + 2] for i in (0, 2)], undisturbed, strict=False
    ):
        # Two batches of a pair from each stream, and one of two from each.
        rows = np.concatenate([b.image for b in small])[[0, 2, 1, 3]]
        np.testing.assert_array_equal(rows, batch.image)


def test_pictures_of_a_tfds_data_set_without_captions_are_refused(config, tmp_path):
    prepare(TinyImages, tmp_path, shards=2)
    config.data.data_dir = str(tmp_path)
    source = open_source("tfds:tiny_images:train", config.data)
    with pytest.raises(
        DataError, match=r"tiny_images:train has no feature `caption`.*image, label"
    ):
        take(1, source, config)


def damaged(directory, changes, config):
    """The source of shards in which some pairs differ, read shard by shard in file order."""
    config.data.update(streams=1, shuffle_window=1)
    return open_source(write_pairs(directory, (6,), changes), config.data)


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [
        (b"no picture", "Unknown image file format"),
        (encode(photograph(20, 20), "JPEG")[:-200], "jpeg::Uncompress failed"),
    ],
    ids=["garbage", "half"],
)
def test_a_picture_that_does_not_decode_is_named_after_the_good_batches(
    config, tmp_path, picture, complaint
):
    config.train.batch_size = 2
    source = damaged(tmp_path, {5: {"jpg": picture}}, config)
    batches = train_batches(source, start(source, config), config, SIZE, CONTEXT)
    for _ in range(2):
        next(batches)
    with pytest.raises(DataError, match=rf"/00000\.tfrecord, record 5: {complaint}"):
        next(batches)


@pytest.mark.parametrize("caption", [b"", b"  \n\t", "\u3000".encode()])
def test_a_caption_without_words_is_named(config, tmp_path, caption):
    source = damaged(tmp_path, {2: {"txt": caption}}, config)
    complaint = r"/00000\.tfrecord, record 2: the caption is empty; write the shard again"
    with pytest.raises(DataError, match=complaint):
        take(1, source, config)


def test_invalid_utf8_is_replaced(config, tmp_path):
    source = damaged(tmp_path, {1: {"txt": b"caf\xe9 noir"}}, config)
    (batch,) = take(1, source, config)
    np.testing.assert_array_equal(batch.tokens[1:2], tokenize(["caf\ufffd noir"], CONTEXT))


def test_a_record_without_the_feature_is_named(config, tmp_path):
    config.data.update(streams=1, shuffle_window=1)
    picture, caption = pair(0)
    good, bad = example(jpg=picture, txt=caption), example(png=picture, txt=caption)
    write_shard(tmp_path / "0", [good, bad, good, good])
    with pytest.raises(DataError, match=r"/0, record 1: .*jpg"):
        take(1, open_source(f"{tmp_path}/0", config.data), config)


def cut(path, part):
    """Leaves out the end of a file, from within its last record or its first on."""
    os.truncate(path, path.stat().st_size - 30 if part == "last" else 30)


@pytest.mark.parametrize(("part", "window"), [("first", 8), ("last", 1)])
def test_a_truncated_shard_is_named(config, tmp_path, part, window):
    config.data.shuffle_window = window
    source = open_source(write_pairs(tmp_path, LENGTHS), config.data)
    cut(tmp_path / "00002.tfrecord", part)
    with pytest.raises(DataError, match=r"/00002\.tfrecord cannot be read: truncated record"):
        take(BATCHES, source, config)


def test_flipped_bits_in_a_shard_are_noticed_and_the_shard_named(config, tmp_path):
    source = open_source(write_pairs(tmp_path, LENGTHS), config.data)
    path = tmp_path / "00001.tfrecord"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"/00001\.tfrecord cannot be read: corrupted record"):
        take(BATCHES, source, config)


def test_a_shard_that_vanished_is_named(config, tmp_path):
    source = open_source(write_pairs(tmp_path, LENGTHS), config.data)
    (tmp_path / "00003.tfrecord").unlink()
    with pytest.raises(DataError, match=r"/00003\.tfrecord cannot be read: .*No such file"):
        take(BATCHES, source, config)


def test_what_streams_and_batch_cannot_share_out_is_refused(source, config):
    config.train.batch_size = 5
    with pytest.raises(DataError, match=r"2 streams do not divide train\.batch_size=5"):
        take(1, source, config)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    prepare(TinyImages, directory, shards=3)
    return str(directory)


@pytest.fixture
def tiny_images(config, data_dir):
    """Ten pictures and labels in three shards; how many there are is known."""
    config.data.data_dir = data_dir
    return open_source("tfds:tiny_images:train", config.data)


def number(image):
    """The pictures of `TinyImages` are of one grey each: their number."""
    assert image.min() == image.max()
    return int(image[0, 0, 0])


@pytest.mark.parametrize("batch_size", [3, 5, 16])
def test_evaluation_gives_every_example_once_and_marks_the_padding(tiny_images, batch_size):
    batches = list(eval_batches(tiny_images, Preprocess(8), batch_size))
    assert len(batches) == -(-10 // batch_size)
    seen = []
    for batch in batches:
        assert batch.image.shape == (batch_size, 8, 8, 3)
        assert batch.image.dtype == np.uint8
        assert batch.valid.shape == (batch_size,)
        assert batch.valid.dtype == bool
        assert batch.features.keys() == {"label"}
        assert not np.any(np.diff(batch.valid.astype(int)) > 0)  # padding is at the end
        assert not batch.image[~batch.valid].any()
        for image, label in zip(
            batch.image[batch.valid], batch.features["label"][batch.valid], strict=True
        ):
            seen.append(number(image))
            assert label == seen[-1] % 2
    assert sorted(seen) == list(range(10))
    assert all(batch.valid.all() for batch in batches[:-1])


def test_evaluation_keeps_the_order_of_the_files_and_the_transform_of_preprocess(source):
    batches = list(eval_batches(source, Preprocess(SIZE), 4))
    assert sum(batch.valid.sum() for batch in batches) == PAIRS  # counted, as nobody knew
    captions = np.concatenate([b.features["caption"][b.valid] for b in batches])
    assert captions.tolist() == [pair(n)[1] for n in range(PAIRS)]
    assert batches[-1].features["caption"][-1] == b""
    pixels = np.concatenate([b.image[b.valid] for b in batches])
    for n, image in enumerate(pixels):
        original = photograph(20 + n % 7, 20 + n % 11, seed=n)
        expected = Preprocess(SIZE).resize(Image.fromarray(original))
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(("examples", "hosts", "per_host"), [(10, 3, 2), (8, 2, 2), (2, 3, 1)])
def test_hosts_share_out_the_evaluation_set_in_equally_many_batches(
    config, data_dir, monkeypatch, examples, hosts, per_host
):
    config.data.data_dir = data_dir
    source = open_source(f"tfds:tiny_images:train[:{examples}]", config.data)
    everything = [number(b.image[0]) for b in eval_batches(source, Preprocess(8), 1)]
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    seen, lengths = [], set()
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        batches = list(eval_batches(source, Preprocess(8), hosts * per_host))
        lengths.add(len(batches))
        for batch in batches:
            assert batch.image.shape == (per_host, 8, 8, 3)
            assert batch.features["label"].shape == (per_host,)
            seen += [number(image) for image in batch.image[batch.valid]]
    assert len(lengths) == 1
    assert sorted(seen) == sorted(everything)
    assert len(everything) == examples


def test_an_evaluation_batch_that_the_hosts_do_not_divide_is_refused(tiny_images, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(DataError, match=r"eval\.batch_size=6 is not a multiple of the 4 hosts"):
        list(eval_batches(tiny_images, Preprocess(8), 6))


def test_evaluation_names_what_it_cannot_read(config, tmp_path):
    source = damaged(tmp_path / "a", {3: {"jpg": b"no picture"}}, config)
    with pytest.raises(DataError, match=r"/a/.*00000.*: .*not a picture that Pillow can read"):
        list(eval_batches(source, Preprocess(8), 2))
    source = damaged(tmp_path / "b", {}, config)
    path = tmp_path / "b" / "00000.tfrecord"
    os.truncate(path, path.stat().st_size - 30)
    with pytest.raises(DataError, match=r"/b/.*00000.* cannot be read: truncated record"):
        list(eval_batches(source, Preprocess(8), 2))


def endless(threads):
    for n in itertools.count():
        threads.add(threading.current_thread())
        yield n


def test_prefetch_keeps_the_order_and_applies_put():
    prefetch = Prefetch(iter(range(50)), lambda n: 10 * n)
    assert list(prefetch) == list(range(0, 500, 10))


def test_prefetch_is_over_when_it_is_over():
    prefetch = Prefetch(iter([1]), lambda n: n)
    assert list(prefetch) == [1]
    assert list(prefetch) == []


@pytest.mark.parametrize("where", ["items", "put"])
def test_an_exception_comes_out_where_the_item_would_have(where):
    def items():
        yield from range(3)
        if where == "items":
            raise DataError("shard 7 is damaged")
        yield 3

    def put(n):
        if n == 3:
            raise DataError("shard 7 is damaged")
        return n

    prefetch = Prefetch(items(), put)
    assert [next(prefetch) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="shard 7 is damaged"):
        next(prefetch)
    with pytest.raises(StopIteration):
        next(prefetch)


def test_close_ends_the_thread_though_the_queue_is_full():
    threads = set()
    prefetch = Prefetch(endless(threads), lambda n: n, depth=2)
    assert next(prefetch) == 0
    (thread,) = threads
    time.sleep(0.3)  # the queue is full by now, and the thread wants to put another one
    assert thread.is_alive()
    prefetch.close()
    assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(prefetch)


def test_prefetch_runs_no_more_than_its_depth_ahead():
    made = []

    def put(n):
        made.append(n)
        return n

    prefetch = Prefetch(itertools.count(), put, depth=3)
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # three in the queue and one in hand
    prefetch.close()


def test_waited_is_the_time_that_the_consumer_was_blocked():
    made = []

    def slowly(n):
        time.sleep(0.1)
        made.append(n)
        return n

    slow = Prefetch(iter(range(6)), slowly)
    assert list(slow) == list(range(6))
    assert slow.waited > 0.5

    made.clear()
    fast = Prefetch(iter(range(6)), slowly, depth=6)
    while len(made) < 6:  # a consumer that has other things to do
        time.sleep(0.01)
    assert list(fast) == list(range(6))
    assert fast.waited < slow.waited / 2
