import concurrent.futures
import html
import importlib.util
import itertools
import json
import pickle
import re
import sys
import time
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax import tokenizer
from clip_jax.tokenizer import EOT, SOT, Tokenizer, tokenize

GOLDENS = json.loads((Path(__file__).parent / "goldens/tokenizer.json").read_text("utf-8"))["cases"]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer()


def full_path(text):
    return html.unescape(html.unescape(ftfy.fix_text(text))).lower().split()


# Ids


def test_constants_are_the_published_ones():
    assert (SOT, EOT, tokenizer.VOCAB_SIZE, tokenizer.CONTEXT_LENGTH) == (49406, 49407, 49408, 77)


def test_ids_are_the_recorded_ones(tok):
    assert len(GOLDENS) > 300
    assert [(text, ids) for text, ids in GOLDENS if tok.encode(text) != ids] == []


def test_ids_do_not_hang_on_what_was_asked_before():
    tok = Tokenizer()
    assert [text for text, ids in reversed(GOLDENS) if tok.encode(text) != ids] == []
    for text, ids in GOLDENS:
        tok._ids_of_chunk.clear()
        assert tok.encode(text) == ids


def test_a_surrogate_pair_is_the_character_it_encodes(tok):
    assert tok.encode("\ud83d\ude00") == tok.encode("\U0001f600")
    assert tok.encode("a \ud83d b") == tok.encode("a \ufffd b")


def test_special_token_text_becomes_the_special_token(tok):
    assert tok.encode("<start_of_text>a<END_OF_TEXT>") == [SOT, *tok.encode("a"), EOT]
    assert max(tok.encode("<|startoftext|><|endoftext|>")) < SOT


ASCII = st.sampled_from([*map(chr, range(128)), "&", "&amp", "&#3", "&lt;", "&eacute", ";"])


@settings(deadline=None, max_examples=500)
@given(st.lists(ASCII).map("".join))
@example("&copy")
@example("a&#38;amp;lt;b")
@example("\x1b[1mbold")
@example("a\x0bb\x1cc\x7fd")
@example("<a &lt; b>")
def test_the_short_cut_for_ascii_changes_nothing(text):
    assert tokenizer._clean(text).lower().split() == full_path(text)


def test_plain_ascii_takes_the_short_cut(monkeypatch):
    monkeypatch.setattr(ftfy, "fix_text", None)
    assert tokenizer._clean("Black & White <3 100% it's; R &") == "Black & White <3 100% it's; R &"


def plain_merging(tok, word):
    """The algorithm as the paper of BPE has it: round by round, everything anew each time."""
    data = word.encode()
    ids = [tok._bytes_of_id.index(bytes([b])) for b in data]
    ids[-1] += 256
    while pairs := [p for p in itertools.pairwise(ids) if p in tok._ids_of_chunk._merges]:
        best = min(pairs, key=tok._ids_of_chunk._merges.__getitem__)
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == best:
                ids[i : i + 2] = [tok._ids_of_chunk._merges[best]]
            i += 1
    return tuple(ids)


@settings(deadline=None)
@given(word=st.text("abehilnost", min_size=1, max_size=40) | st.text("an", min_size=1))
def test_merging_is_the_plain_algorithm(tok, word):
    assert tok._ids_of_chunk._encode_word(word) == plain_merging(tok, word)


def test_every_word_of_the_vocabulary_merges_into_itself(tok):
    merging = tokenizer._ChunkCache(tok._ids_of_chunk._merges, words={})
    words = {w: i for w, i in tok._ids_of_chunk._id_of_word.items() if i < SOT}
    assert len(words) > 30_000
    assert [w for w, i in words.items() if merging._encode_word(w) != (i,)] == []


def test_a_merge_outranks_the_merges_that_made_its_parts(tok):
    # What lets the tokenizer take the id of a merge for its rank, and merge pairs out of turn.
    merges = tok._ids_of_chunk._merges
    assert list(merges.values()) == list(range(512, SOT))
    assert all(max(pair) < merged for pair, merged in merges.items())
    assert len(set(tok._bytes_of_id)) == tokenizer.VOCAB_SIZE


def test_a_long_word_takes_no_quadratic_time(tok):
    start = time.process_time()
    assert len(tok.encode("日本語" * 10_000)) == 40_000
    # 0.05 s of processor time; 7 s or more if every merge looked at the whole word.
    assert time.process_time() - start < 2


# Decoding


def test_every_token_of_whole_characters_decodes_to_its_text(tok):
    assert tok.decode([320, 1125, 539, 320, 2368]) == "a photo of a cat "
    assert tok.decode([SOT, 320, EOT]) == "<start_of_text>a <end_of_text>"
    assert tok.decode(tok.encode("日本語 😀")) == "日本語 😀 "
    assert tok.decode([]) == ""
    assert tok.decode(np.asarray([320], np.int32)) == "a "


@settings(deadline=None)
@given(text=st.text())
def test_decoding_gives_back_the_letters(tok, text):
    def squeeze(text):
        return re.sub(r"[\s\u0345]", "", text)

    assert squeeze(tok.decode(tok.encode(text))) == squeeze("".join(full_path(text)))


def test_part_of_a_character_decodes_to_the_replacement_character(tok):
    assert tok.decode(tok.encode("\U000e0001")[:1]) == "\ufffd"


@pytest.mark.parametrize("ids", [[-1], [0, tokenizer.VOCAB_SIZE]])
def test_decoding_ids_outside_the_vocabulary_raises(tok, ids):
    with pytest.raises(ValueError, match=r"expected ids in \[0, 49408\), got"):
        tok.decode(ids)


# Batches


def test_a_batch_is_sot_ids_eot_zeros():
    batch = tokenize(["a cat", "", "dog"])
    assert batch.shape == (3, 77)
    assert batch.dtype == np.int32
    assert batch[0, :5].tolist() == [SOT, 320, 2368, EOT, 0]
    assert batch[1, :3].tolist() == [SOT, EOT, 0]
    assert not batch[:, 5:].any()


def test_one_string_is_a_batch_of_one():
    np.testing.assert_array_equal(tokenize("a cat"), tokenize(["a cat"]))
    assert tokenize("a cat").shape == (1, 77)


def test_batches_of_no_text_and_of_other_sequences():
    assert tokenize([]).shape == (0, 77)
    assert tokenize([]).dtype == np.int32
    np.testing.assert_array_equal(tokenize(("a", "b")), tokenize(["a", "b"]))


@pytest.mark.parametrize("words", [1, 3, 4, 5, 6, 100])
def test_truncation_keeps_eot_last(words):
    row = tokenize("cat " * words, context_length=6, truncate=True)[0].tolist()
    kept = min(words, 4)
    assert row == [SOT, *[2368] * kept, EOT, *[0] * (4 - kept)]


def test_a_text_that_just_fits_is_no_error():
    assert tokenize("cat " * 75)[0, -1] == EOT


def test_a_text_too_long_raises():
    long = "a photo of something " * 30
    with pytest.raises(
        ValueError, match=r"text 1, 'a photo of.* 122 tokens .* 77: .*truncate=True"
    ):
        tokenize(["short", long])
    with pytest.raises(ValueError, match="context length is 4"):
        tokenize("a photo of a cat", context_length=4)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_context_without_room_for_sot_and_eot_raises(length):
    with pytest.raises(ValueError, match=f"context_length >= 2 .*got {length}"):
        tokenize("a", context_length=length, truncate=True)


@pytest.fixture(scope="module")
def unchecked():
    """The module as users have it: in the tests, signatures are checked before our code runs."""
    spec = importlib.util.spec_from_file_location("unchecked_tokenizer", tokenizer.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (5, "int 5"),
        (None, "NoneType"),
        (b"cat", "bytes b'cat'"),
        (["cat", 5], "int 5"),
        ([b"cat"], "bytes b'cat'"),
        ([["cat"]], "list"),
        (np.arange(2), "int64"),
    ],
)
def test_what_is_not_text_raises(unchecked, texts, found):
    with pytest.raises(TypeError, match=f"expected a string .*got {found}"):
        unchecked.tokenize(texts)


def test_iterables_that_are_no_sequence_work_too(unchecked):
    for texts in [np.array(["a", "b"]), {"a": 1, "b": 2}.keys(), iter("ab")]:
        np.testing.assert_array_equal(unchecked.tokenize(texts), tokenize(["a", "b"]))


# Vocabulary file, cache, threads


def test_a_damaged_vocabulary_raises(tmp_path, monkeypatch):
    data = bytearray(tokenizer.MERGES_PATH.read_bytes())
    data[1000] ^= 1
    damaged = tmp_path / "merges.gz"
    damaged.write_bytes(data)
    monkeypatch.setattr(tokenizer, "MERGES_PATH", damaged)
    with pytest.raises(ValueError, match=r"merges\.gz is damaged: expected sha256 924691ac"):
        Tokenizer()


def test_the_vocabulary_file_is_the_published_one():
    published = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert published == tokenizer.MERGES_SHA256
    assert tokenizer.MERGES_PATH.stat().st_size == 1_356_917
    licence = tokenizer.MERGES_PATH.with_name("bpe_simple_vocab_16e6.LICENSE.txt").read_text()
    assert "Copyright (c) 2021 OpenAI" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_tokenize_reads_the_vocabulary_once(monkeypatch):
    tokenize("a")
    monkeypatch.setattr(tokenizer, "MERGES_PATH", None)
    tokenize("b")


def test_the_cache_is_bounded_and_its_emptying_changes_no_ids(monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE_ENTRIES", 50)
    tok = Tokenizer()
    for text, ids in GOLDENS:
        assert tok.encode(text) == ids
        assert len(tok._ids_of_chunk) <= 50
    assert len(tok._ids_of_chunk) > 10


def test_the_full_cache_stays_under_the_stated_size():
    tok = Tokenizer()
    widest = "\U00016e60\U00016e61\U00016e62\U00016e63" * (tokenizer.CACHE_CHUNK_LENGTH // 4)
    tok.encode(widest)
    ids = tok._ids_of_chunk[widest]
    slot = 3 * 8 * 1.5 + 4 * 2  # an entry of a dict at its emptiest, and its two index cells
    entry = sys.getsizeof(widest) + sys.getsizeof(ids) + slot
    assert len(ids) == 4 * tokenizer.CACHE_CHUNK_LENGTH
    assert entry * tokenizer.CACHE_ENTRIES < 150e6


def test_long_chunks_are_not_cached():
    tok = Tokenizer()
    tok.encode("x" * tokenizer.CACHE_CHUNK_LENGTH)
    assert len(tok._ids_of_chunk) == 1
    tok.encode("y" * (tokenizer.CACHE_CHUNK_LENGTH + 1))
    assert len(tok._ids_of_chunk) == 1


def test_threads_share_a_tokenizer(monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE_ENTRIES", 40)  # so that they empty it for each other
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        tok = Tokenizer()
        cases = [case for case in GOLDENS if len(case[0]) < 60]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(lambda: [tok.encode(text) for text, _ in cases]) for _ in range(8)]
        assert all(job.result() == [ids for _, ids in cases] for job in jobs)
    finally:
        sys.setswitchinterval(interval)


def test_a_tokenizer_survives_pickling(tok):
    again = pickle.loads(pickle.dumps(tok))
    assert again.encode("a Photo of unpickledness") == tok.encode("a Photo of unpickledness")
    assert again.decode([320]) == "a "
