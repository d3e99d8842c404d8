"""The order: a pure function of the seed, whatever the hosts and wherever one resumes."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import spearmanr

from clip_jax.data.draws import hashed, permutation, uniforms
from clip_jax.data.faults import Faults
from clip_jax.data.order import Order, Place, Stream
from clip_jax.data.source import Mixture, Record, Source
from clip_jax.errors import DataError

LENGTHS = (5, 3, 7, 4, 2, 2)
SIZE = 10  # bytes of a record


class Shards:
    """Shards in memory; counts the records that are read, and refuses what lies in `broken`."""

    def __init__(self, lengths=LENGTHS, broken=()):
        self.lengths = lengths
        self.broken = set(broken)
        self.read_count = 0
        self.source = Source(
            spec="pairs",
            shards=[f"shard{i}" for i in range(len(lengths))],
            read=self.read,
            fields={"record": tf.TensorSpec([], tf.string)},
            parse=dict,
        )

    def read(self, shard, offset, index):
        assert offset == index * SIZE  # as a seek in the file, never a search
        if shard in self.broken:
            raise tf.errors.DataLossError(None, None, "gone")
        for i in range(index, self.lengths[shard]):
            self.read_count += 1
            yield Record(str(i), (i + 1) * SIZE, {"record": f"{shard}/{i}"}, SIZE)

    def names(self, shards=None):
        shards = range(len(self.lengths)) if shards is None else shards
        return sorted(f"{shard}/{i}" for shard in shards for i in range(self.lengths[shard]))


def stream_of(shards, number=(0, 0, 1), seed=0, window=4 * SIZE, place=None, max_bad=0.5):
    place = place or Place()
    return Stream(shards.source, number, seed, window, place, Faults(max_bad))


def windows(stream, epochs=None, count=None):
    """The windows of so many whole epochs, or so many."""
    if count is not None:
        return list(itertools.islice(stream.windows(), count))
    return list(itertools.takewhile(lambda w: w.start.epoch < epochs, stream.windows()))


def names(window):
    return [record.fields["record"] for record in window.records]


def flat(found):
    return list(itertools.chain.from_iterable(map(names, found)))


@pytest.mark.parametrize("window", [1, 3 * SIZE, 4 * SIZE, 1000 * SIZE])
def test_every_epoch_holds_every_record_once_in_a_new_order(window):
    shards = Shards()
    orders = set()
    for _, group in itertools.groupby(
        windows(stream_of(shards, window=window), epochs=5), lambda w: w.start.epoch
    ):
        epoch = flat(group)
        assert sorted(epoch) == shards.names()
        orders.add(tuple(epoch))
    assert len(orders) == 5


def test_streams_share_out_the_shards():
    shards = Shards()
    for stream in range(2):
        found = flat(windows(stream_of(shards, (0, stream, 2)), epochs=1))
        assert sorted(found) == shards.names(range(stream, 6, 2))


@pytest.mark.parametrize("streams", [7, 8, 12, 13])
def test_more_streams_than_shards_share_the_records_of_a_shard(streams):
    shards = Shards((40, 30, 50))
    parts = [
        flat(windows(stream_of(shards, (0, stream, streams)), epochs=1))
        for stream in range(streams)
    ]
    assert sorted(itertools.chain(*parts)) == shards.names()
    assert min(map(len, parts)) >= 30 // (streams // 3 + 1)


def test_the_seed_the_source_and_the_stream_decide_the_order():
    shards = Shards((100,))
    found = {
        tuple(flat(windows(stream_of(shards, (source, stream, 1), seed), epochs=1)))
        for source, stream, seed in [(0, 0, 0), (1, 0, 0), (0, 0, 1)]
    }
    assert len(found) == 3
    again = flat(windows(stream_of(shards), epochs=1))
    assert tuple(again) in found


def test_tickets_count_the_records_through_windows_and_epochs():
    found = windows(stream_of(Shards()), epochs=3)
    assert [w.start.ticket for w in found] == list(
        itertools.accumulate((len(w.records) for w in found[:-1]), initial=0)
    )
    for one, other in itertools.pairwise(found):
        assert other.start == one.end


@pytest.mark.parametrize("room", [SIZE, 3 * SIZE, 35])
def test_a_window_holds_no_more_bytes_than_it_may_and_one_record(room):
    found = windows(stream_of(Shards((100, 100)), window=room), epochs=1)
    sizes = [sum(record.size for record in w.records) for w in found]
    assert max(sizes) < room + SIZE
    assert all(size >= room for size in sizes[:-1])


def test_any_window_can_be_read_again_from_its_start_alone():
    shards = Shards()
    for window in windows(stream_of(shards), epochs=3):
        (again,) = windows(stream_of(shards, place=window.start._replace(taken=1)), count=1)
        assert again == window


def test_resuming_in_a_million_records_reads_no_more_than_a_window_again():
    shards = Shards((100_000,) * 10)
    window = 1_000
    reference = windows(stream_of(shards, window=window * SIZE), count=800)
    place = reference[-1].start
    assert place.ticket == 799_000
    shards.read_count = 0
    (again,) = windows(stream_of(shards, window=window * SIZE, place=place), count=1)
    assert shards.read_count == window
    assert names(again) == names(reference[-1])


def test_the_ranks_of_file_order_and_batch_order_hardly_correlate():
    # 64 shards of 1,000 records, a window of 2,000: 3 % of the data.
    shards = Shards((1_000,) * 64)
    found = flat(windows(stream_of(shards, window=2_000 * SIZE), epochs=1))
    rank = {
        name: number
        for number, name in enumerate(f"{s}/{i}" for s in range(64) for i in range(1_000))
    }
    correlation = spearmanr([rank[name] for name in found], range(len(found))).statistic
    assert abs(correlation) < 0.3  # shards in a random order: the standard deviation is 1/8
    # Within a shard's window nothing is left of the order.
    first = [int(name.partition("/")[2]) for name in found[:2_000]]
    assert abs(spearmanr(first, range(2_000)).statistic) < 0.08


def test_a_shard_that_cannot_be_read_is_counted_and_passed_over():
    shards = Shards((50,) * 20, broken=[7])
    stream = stream_of(shards)
    found = flat(windows(stream, epochs=2))
    expected = shards.names([s for s in range(20) if s != 7])
    assert sorted(found) == sorted(expected * 2)
    assert stream._faults.counts() == {"unreadable_shard": 2}


def test_too_many_lost_shards_stop_the_run():
    stream = stream_of(Shards((50,) * 20, broken=range(0, 20, 2)), max_bad=0.1)
    with pytest.raises(DataError, match=r"of \d+ shards are bad \(3 unreadable_shard\).*max_bad"):
        windows(stream, epochs=1)


@pytest.mark.parametrize("lengths", [(0, 0), (0,)])
def test_empty_shards_are_refused_instead_of_searched_for_ever(lengths):
    with pytest.raises(DataError, match=r"no record can be read .*shard0"):
        windows(stream_of(Shards(lengths)), count=1)


def test_an_empty_shard_beside_a_full_one_does_no_harm():
    shards = Shards((0, 3, 0))
    assert sorted(flat(windows(stream_of(shards), epochs=2))) == sorted(shards.names() * 2)


def order(shards=None, weights=(1.0,), streams=4, shuffle_bytes=800, seed=0):
    source = (shards or Shards()).source
    return Order.start(Mixture((source,) * len(weights), weights), seed, streams, shuffle_bytes)


def test_the_window_is_shared_out_among_streams_sources_and_the_two_that_are_in_memory():
    assert order().window == 100
    assert order(weights=(0.5, 0.5)).window == 50
    assert order(shuffle_bytes=3).window == 1


def test_no_stream_at_all_is_refused():
    with pytest.raises(DataError, match=r"config\.data\.streams=0"):
        order(streams=0)


def test_what_batch_and_hosts_cannot_share_out_is_refused():
    with pytest.raises(DataError, match=r"4 streams do not divide train\.batch_size=6"):
        order().rows_per_stream(6)
    with pytest.raises(DataError, match="4 streams cannot be shared out among 3 hosts"):
        order().own_streams(0, 3)
    assert [list(order().own_streams(host, 2)) for host in range(2)] == [[0, 1], [2, 3]]


def test_the_plain_form_keeps_everything():
    one = dataclasses.replace(
        order(weights=(0.5, 0.5)), rows=12, places=((Place(1, 2, 2**40, 4, 2**41, 6),) * 4,) * 2
    )
    assert Order.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 5}, "seed: 5 there, 0 now"),
        ({"spec": "other/*"}, r"spec: other/\* there, pairs \(6 shards\) now"),
        ({"window": 99}, "window: 99 there, 100 now"),
        ({"places": [[[0] * 6]]}, "streams: 1 there, 4 now"),
        ({"positions": [0]}, "another version"),
    ],
)
def test_the_place_of_another_order_is_refused(change, complaint):
    one = order()
    with pytest.raises(DataError, match=complaint) as caught:
        one.resume(one.to_dict() | change)
    assert str(caught.value).count(" there, ") <= 1


def test_all_differences_are_named_at_once():
    saved = order(weights=(0.5, 0.5), streams=2, shuffle_bytes=80, seed=1).to_dict()
    with pytest.raises(DataError, match=r"spec: .*seed: .*window: .*streams: "):
        order().resume(saved)


def test_the_order_of_all_hosts_takes_each_streams_place_from_its_host():
    places = np.zeros([2, 1, 4, 6], np.int64)
    places[0, 0, :, 4] = [2**40, 2, -1, -1]  # host 0 knows of streams 0 and 1
    places[1, 0, :, 4] = [-1, -1, 3, 4]
    merged = order().merged(places)
    assert [place.ticket for place in merged.places[0]] == [2**40, 2, 3, 4]


def test_sources_take_turns_by_weight_and_whatever_the_batch_size():
    weights = (0.5, 0.3, 0.2)
    one = order(weights=weights)
    turns = one.turns(1, 30_000, weights)
    shares = np.bincount(turns, minlength=3) / len(turns)
    np.testing.assert_allclose(shares, weights, atol=0.015)
    later = dataclasses.replace(one, rows=1_000)
    np.testing.assert_array_equal(later.turns(1, 50, weights), turns[1_000:1_050])
    assert list(one.turns(2, 50, weights)) != list(turns[:50])


def test_draws_are_uniform_and_depend_on_every_number_and_on_their_order():
    draws = uniforms(4, 3, np.arange(100_000))
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.005)
    np.testing.assert_allclose(draws.std(0), 12**-0.5, atol=0.005)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.02
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.02
    numbers = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**40,), (2**40 + 1,), (0, 0, 0)]
    assert len({int(hashed(*n)) for n in numbers}) == len(numbers)


def test_draws_never_change_between_versions():
    # A change here moves the data of every run that is resumed.
    assert int(hashed(1, 2, 3)) == 7702586659592502839
    np.testing.assert_array_equal(permutation(8, 5), [6, 3, 7, 2, 5, 1, 4, 0])


def test_all_permutations_come_equally_often():
    counts = collections.Counter(tuple(permutation(4, n)) for n in range(24_000))
    assert len(counts) == 24
    assert max(abs(count - 1_000) for count in counts.values()) < 150
