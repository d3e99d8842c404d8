"""The order: a pure function of (seed, position), whatever the hosts and wherever one resumes."""

import functools
import itertools
import json
from typing import NamedTuple

import pytest
import tensorflow as tf

from clip_jax.data.order import Order, fold_in, ordered_records
from clip_jax.data.sources import Shard, Source
from clip_jax.errors import DataError
from tests.data.records import write_shard

# Stream 0 of two holds 14 records, stream 1 nine. At two to a batch, 16 batches hold two epochs of
# the one and three of the other; epochs begin in batches 4, 7, 9, 13 and 14.
LENGTHS = (5, 3, 7, 4, 2, 2)
STREAMS = 2
BATCH = 4
BATCHES = 16
WINDOW = 10  # five records to a stream
KINDS = ("counts known", "counts unknown", "parts of shards")


class Row(NamedTuple):
    record: str
    stream: int
    ticket: int


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    for shard, length in enumerate(LENGTHS):
        write_shard(directory / f"{shard}", [f"{shard}/{i}".encode() for i in range(length)])
    whole = tuple(Shard(f"{directory}/{shard}") for shard in range(len(LENGTHS)))
    # The first record of every shard is left out, and every other shard's last one.
    parts = tuple(Shard(s.path, 1, LENGTHS[i] - 1 - i % 2) for i, s in enumerate(whole))
    return {
        "counts known": Source("pairs", whole, parse=dict, counts=LENGTHS),
        "counts unknown": Source("pairs", whole, parse=dict),
        "parts of shards": Source("pairs", parts, parse=dict, counts=tuple(p.take for p in parts)),
    }


@pytest.fixture(params=KINDS)
def source(request, sources):
    return sources[request.param]


@pytest.fixture
def known(sources):
    return sources["counts known"]


def expected_records(source, stream=None):
    """Names of all records, or of a stream's: "shard/index"."""
    names = set()
    for shard in range(len(LENGTHS)) if stream is None else range(stream, len(LENGTHS), STREAMS):
        _, skip, take = source.shards[shard]
        end = LENGTHS[shard] if take == -1 else skip + take
        names |= {f"{shard}/{i}" for i in range(skip, end)}
    return names


def start(source, seed=0, streams=STREAMS, window=WINDOW):
    return Order.start(source, seed, streams, window)


def read(source, order, batches=BATCHES, batch_size=BATCH, host=0, hosts=1):
    """The next batches of a host: lists of rows."""
    records = ordered_records(source, order, batch_size, host, hosts)
    size = batch_size // hosts
    rows = [
        Row(r["record"].decode(), int(r["stream"]), int(r["ticket"]))
        for r in records.take(batches * size).as_numpy_iterator()
    ]
    assert len(rows) == batches * size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


undisturbed = functools.cache(read)  # read once for all tests that compare with it


def by_stream(batches):
    rows = list(itertools.chain.from_iterable(batches))
    return [[row for row in rows if row.stream == stream] for stream in range(STREAMS)]


def epochs(rows, length):
    """Names of a stream's records, epoch by epoch; whole ones only."""
    names = [row.record for row in rows]
    return [names[i : i + length] for i in range(0, len(names) - length + 1, length)]


def test_the_same_seed_gives_the_same_records(known):
    assert read(known, start(known)) == undisturbed(known, start(known))


def test_another_seed_gives_another_order(known):
    one = by_stream(undisturbed(known, start(known)))
    other = by_stream(read(known, start(known, seed=1)))
    for stream in range(STREAMS):
        length = len(expected_records(known, stream))
        for pair in zip(epochs(one[stream], length), epochs(other[stream], length), strict=True):
            assert pair[0] != pair[1]


def test_the_seed_of_the_process_does_not_matter(known):
    tf.random.set_seed(1234)
    try:
        assert read(known, start(known)) == undisturbed(known, start(known))
    finally:
        tf.compat.v1.set_random_seed(None)


def test_every_epoch_of_a_stream_holds_its_records_once_in_a_new_order(source):
    for stream, rows in enumerate(by_stream(undisturbed(source, start(source)))):
        names = expected_records(source, stream)
        passes = epochs(rows, len(names))
        assert len(passes) >= 2
        for order in passes:
            assert sorted(order) == sorted(names)
        assert len({tuple(order) for order in passes}) > 1


def test_the_streams_share_out_all_records(source):
    rows = itertools.chain(*undisturbed(source, start(source)))
    assert {row.record for row in rows} == expected_records(source)


def test_shard_and_index_say_where_a_record_was_read(sources):
    source = sources["parts of shards"]
    records = ordered_records(source, start(source), BATCH, 0, 1).take(40)
    for record in records.as_numpy_iterator():
        shard = record["shard"].decode().rpartition("/")[2]
        assert record["record"].decode() == f"{shard}/{record['index']}"


def test_tickets_count_the_records_of_a_stream_and_batches_take_equal_shares(source):
    batches = undisturbed(source, start(source))
    for batch in batches:
        assert [row.stream for row in batch] == [0, 0, 1, 1]
    for rows in by_stream(batches):
        assert [row.ticket for row in rows] == list(range(2 * BATCHES))


def assert_resumes_after(batches, source, **kwargs):
    saved = json.loads(json.dumps(start(source, **kwargs).after(batches, BATCH).to_dict()))
    resumed = start(source, **kwargs).resume(saved)
    expected = undisturbed(source, start(source, **kwargs))[batches:]
    assert read(source, resumed, BATCHES - batches) == expected


@pytest.mark.parametrize("batches", [1, 7, 13])
def test_resuming_continues_as_if_nothing_had_happened(source, batches):
    assert_resumes_after(batches, source)


@pytest.mark.parametrize("window", [1, 1000])
def test_resuming_does_so_whatever_the_window(known, window):
    assert_resumes_after(6, known, window=window)


def test_resuming_twice_is_resuming_once(known):
    order = start(known)
    assert order.after(2, BATCH).after(3, BATCH) == order.after(5, BATCH)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_what_one_host_holds(known, hosts):
    order = start(known, streams=4).after(3, 8)
    parts = [read(known, order, 6, 8, host, hosts) for host in range(hosts)]
    together = [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)]
    assert together == undisturbed(known, order, 6, 8)


def test_a_window_of_one_reads_shards_through_in_an_order_that_changes_by_epoch(known):
    for stream, rows in enumerate(by_stream(undisturbed(known, start(known, window=1)))):
        orders = set()
        for names in epochs(rows, len(expected_records(known, stream))):
            shards = list(dict.fromkeys(name.partition("/")[0] for name in names))
            assert names == [f"{s}/{i}" for s in shards for i in range(LENGTHS[int(s)])]
            orders.add(tuple(shards))
        assert len(orders) > 1


def test_the_window_bounds_how_early_a_record_comes(known):
    # What a window of one leaves in place, a wider one starts from.
    plain = by_stream(undisturbed(known, start(known, window=1)))
    shuffled = by_stream(undisturbed(known, start(known)))
    for stream in range(STREAMS):
        length = len(expected_records(known, stream))
        for before, after in zip(
            epochs(plain[stream], length), epochs(shuffled[stream], length), strict=True
        ):
            moves = [before.index(name) - position for position, name in enumerate(after)]
            assert 1 < max(moves) < WINDOW // STREAMS


def test_there_are_no_more_streams_than_shards_and_the_window_is_shared_out(known):
    order = start(known, streams=64, window=100)
    assert order.positions == (0,) * 6
    assert order.window == 16


def test_no_stream_at_all_is_refused(known):
    with pytest.raises(DataError, match=r"config\.data\.streams=0"):
        start(known, streams=0)


def test_the_plain_form_keeps_everything(known):
    order = start(known, seed=7).after(3, BATCH)
    plain = json.loads(json.dumps(order.to_dict()))
    assert Order.from_dict(plain) == order
    assert plain["positions"] == [6, 6]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 5}, "seed: 5 there, 0 now"),
        ({"spec": "other/*"}, r"spec: other/\* there, pairs now"),
        ({"window": 99}, "window: 99 there, 5 now"),
        ({"positions": [0]}, "streams: 1 there, 2 now"),
    ],
)
def test_the_place_of_another_order_is_refused(known, change, complaint):
    order = start(known)
    with pytest.raises(DataError, match=complaint) as caught:
        order.resume(order.to_dict() | change)
    assert str(caught.value).count(" there, ") == 1


def test_all_differences_are_named_at_once(known):
    order = start(known)
    with pytest.raises(DataError, match=r"spec: .*seed: .*window: .*streams: "):
        order.resume({"spec": "x", "seed": 1, "window": 2, "positions": [0]})


def test_a_batch_that_the_streams_do_not_divide_is_refused(known):
    order = start(known)
    complaint = r"2 streams do not divide train\.batch_size=5"
    with pytest.raises(DataError, match=complaint):
        ordered_records(known, order, 5, 0, 1)
    with pytest.raises(DataError, match=complaint):
        order.after(1, 5)


def test_streams_that_the_hosts_cannot_share_out_are_refused(known):
    with pytest.raises(DataError, match="2 streams cannot be shared out among 3 hosts"):
        ordered_records(known, start(known), 6, 0, 3)


@pytest.mark.parametrize("counts", [(0, 3), None])
def test_a_stream_of_empty_shards_is_refused_instead_of_searched_for_ever(tmp_path, counts):
    write_shard(tmp_path / "0", [])
    write_shard(tmp_path / "1", [b"record"] * 3)
    shards = (Shard(f"{tmp_path}/0"), Shard(f"{tmp_path}/1"))
    source = Source("half empty", shards, parse=dict, counts=counts)
    with pytest.raises(DataError, match=r"half empty: stream 0 of 2 holds no record.*/0"):
        ordered_records(source, start(source, streams=2), 2, 0, 1)


def test_an_empty_shard_beside_a_full_one_does_no_harm(tmp_path):
    write_shard(tmp_path / "0", [])
    write_shard(tmp_path / "1", [b"a", b"b", b"c"])
    source = Source("pairs", (Shard(f"{tmp_path}/0"), Shard(f"{tmp_path}/1")), parse=dict)
    rows = itertools.chain(*read(source, start(source, streams=1), 3, batch_size=2))
    assert sorted(row.record for row in rows) == ["a", "a", "b", "b", "c", "c"]


def test_derived_seeds_depend_on_every_number_and_on_their_order():
    numbers = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**40,), (2**40 + 1,)]
    seeds = [tuple(fold_in([3, 0], *n).numpy()) for n in numbers]
    seeds += [tuple(fold_in(seed, 0).numpy()) for seed in ([3, 1], [4, 0])]
    assert len(set(seeds)) == len(seeds)
    assert tuple(fold_in([3, 0], 0, 1).numpy()) == seeds[4]
