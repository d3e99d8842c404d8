"""Strings to token ids: CLIP's byte-level BPE with the published vocabulary.

The ids are those of ``open_clip.SimpleTokenizer`` for every string, and so OpenAI's but for text
that spells a special token (tests/parity/test_tokenizer.py). The work is arranged to be quick:

* Text that is printable ASCII without HTML entities needs no cleaning, and skips it.
* No token spans white space, so the ids of each white-space-separated chunk are cached.
* A word that the vocabulary holds needs no merging: it would merge into just that.
* The id of a merge *is* its rank, so one dict of pairs of ids is the whole merge table.
"""

import functools
import gzip
import hashlib
import html
import itertools
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex

SOT = 49406  # start of text
EOT = 49407  # end of text
VOCAB_SIZE = 49408
CONTEXT_LENGTH = 77

MERGES_PATH = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2  # the file lists more than CLIP uses

# In a caption these spell the special tokens themselves. The names are open_clip's (OpenAI's
# tokenizer spells them <|startoftext|> and <|endoftext|>).
SPECIAL_TOKENS = {"<start_of_text>": SOT, "<end_of_text>": EOT}
# What BPE may not merge across: English contractions, runs of letters, single digits, and runs of
# anything else. Case is ignored even though the text is lower-cased: "ſ" is an "s" here.
WORD = regex.compile(
    "|".join([*SPECIAL_TOKENS, "'s|'t|'re|'ve|'m|'ll|'d", r"[\p{L}]+", r"[\p{N}]"])
    + r"|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# html.unescape and ftfy leave every other ampersand in printable ASCII alone.
MAYBE_ENTITY = re.compile("&[^ <&;]")

# 131,072 chunks of at most 24 characters: about 20 MB of ordinary words. A chunk of the worst kind
# takes 1.1 kB (96 ids), so the cache stays under 150 MB whatever it is fed.
CACHE_ENTRIES = 1 << 17
CACHE_CHUNK_LENGTH = 24


class Tokenizer:
    """CLIP's tokenizer: lower-cased text to ids in [0, 49408), and back.

    An instance may be shared between threads and pickled.

    Args:
        context_length: of the batches, unless a call says otherwise.

    Raises:
        FileNotFoundError, ValueError: the vocabulary file is missing, or damaged.
    """

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        self.context_length = context_length
        symbols, merges = load_vocabulary()
        byte_of_char = {char: byte for byte, char in _alphabet().items()}
        self._bytes_of_id = [
            bytes(map(byte_of_char.__getitem__, symbol)) for symbol in [*symbols, *SPECIAL_TOKENS]
        ]
        # Only an ASCII word is written in the file as it is in the text.
        words = {s[:-4]: i for i, s in enumerate(symbols) if s.endswith("</w>") and s.isascii()}
        self._ids_of_chunk = _ChunkCache(merges, words | SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ``text``, without SOT and EOT.

        The text is cleaned as OpenAI's is: ftfy's repairs, HTML entities unescaped twice, white
        space collapsed, lower case.

        Raises:
            TypeError: ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a string to tokenize, got {describe(text)}")
        chunks = _clean(text).lower().split()
        return list(itertools.chain.from_iterable(map(self._ids_of_chunk.__getitem__, chunks)))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text that ``ids`` spell, as open_clip does.

        A space ends every word, bytes that are no UTF-8 become U+FFFD, SOT and EOT become
        "<start_of_text>" and "<end_of_text>", and padding becomes "!", whose id it shares.

        Raises:
            ValueError: an id is outside [0, 49408).
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < VOCAB_SIZE:
            raise ValueError(f"expected ids in [0, {VOCAB_SIZE}), got [{min(ids)}, {max(ids)}]")
        spelled = b"".join([self._bytes_of_id[i] for i in ids])
        return spelled.decode("utf-8", errors="replace").replace("</w>", " ")

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """Returns int32 [B, T]: each row SOT, the ids of one text, EOT, and zeros.

        Args:
            texts: B texts, or one (then B is 1).
            context_length: T, at least 2; default: the tokenizer's.
            truncate: cut texts of more than T tokens so that EOT is the last, instead of raising.

        Raises:
            TypeError: ``texts`` is neither a string nor a sequence of strings.
            ValueError: a text is too long and ``truncate`` is false, or T is less than 2.
        """
        length = self.context_length if context_length is None else context_length
        return batch_rows(self.encode, texts, length, truncate, (SOT,), (EOT,), pad=0)


def batch_rows(
    encode: Callable[[str], list[int]],
    texts: str | Sequence[str],
    context_length: int,
    truncate: bool,
    start: tuple[int, ...],
    end: tuple[int, ...],
    pad: int,
) -> np.ndarray:
    """Rows of start, ids, end and padding; `Tokenizer.__call__` says what is raised."""
    special = len(start) + len(end)
    if context_length < special:
        raise ValueError(
            f"expected context_length >= {special} (the special tokens), got {context_length}"
        )
    if isinstance(texts, str):
        texts = [texts]
    elif isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"expected a string or a sequence of strings, got {describe(texts)}")
    texts = list(texts)
    rows = [encode(text) for text in texts]
    out = np.full((len(rows), context_length), pad, np.int32)
    for i, ids in enumerate(rows):
        if len(ids) + special > context_length:
            if not truncate:
                raise ValueError(
                    f"text {i}, {reprlib.repr(texts[i])}, has {len(ids) + special} tokens with "
                    f"the special ones, but the context length is {context_length}: "
                    "pass truncate=True to cut it"
                )
            del ids[context_length - special :]
        out[i, : len(ids) + special] = [*start, *ids, *end]
    return out


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> np.ndarray:
    """Returns int32 [B, T] from one shared `Tokenizer`; see `Tokenizer.__call__`."""
    return _default_tokenizer()(texts, context_length, truncate)


@functools.cache
def _default_tokenizer() -> Tokenizer:
    return Tokenizer()


class _ChunkCache(dict[str, tuple[int, ...]]):
    """The ids of a chunk (a word or several, no white space), computed when first asked for."""

    def __init__(self, merges: dict[tuple[int, int], int], words: dict[str, int]) -> None:
        super().__init__()
        self._merges = merges
        self._id_of_word = words
        self._id_of_byte = {byte: i for i, byte in enumerate(_alphabet())}

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        words = WORD.findall(chunk)
        if words == [chunk]:
            return self._remember(chunk, self._encode_word(chunk))
        ids: list[int] = []
        for word in words:
            ids += self.get(word) or self._remember(word, self._encode_word(word))
        return self._remember(chunk, tuple(ids))

    def _remember(self, chunk: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(chunk) <= CACHE_CHUNK_LENGTH:
            if len(self) >= CACHE_ENTRIES:
                self.clear()
            self[chunk] = ids
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Byte-pair encoding: of all adjacent pairs, merge the one of lowest rank, repeatedly."""
        if word in self._id_of_word:
            return (self._id_of_word[word],)
        ids = [self._id_of_byte[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the same byte at the end of a word
        # merged[i] is what ids[i] and ids[i + 1] merge into; VOCAB_SIZE where they do not.
        merge = self._merges.get
        merged = [merge(pair, VOCAB_SIZE) for pair in itertools.pairwise(ids)]
        while merged and (best := min(merged)) < VOCAB_SIZE:
            if merged.count(best) == 1:
                i = merged.index(best)
                ids[i : i + 2] = [best]
                del merged[i]
                if i > 0:
                    merged[i - 1] = merge((ids[i - 1], best), VOCAB_SIZE)
                if i < len(merged):
                    merged[i] = merge((best, ids[i + 1]), VOCAB_SIZE)
            else:  # in one pass: one by one, a long run of letters would take quadratic time
                ids = _merge_everywhere(ids, merged, best)
                merged = [merge(pair, VOCAB_SIZE) for pair in itertools.pairwise(ids)]
        return tuple(ids)


def _merge_everywhere(ids: list[int], merged: list[int], best: int) -> list[int]:
    """Replaces, from left to right, every pair of ids that merges into ``best``."""
    out = []
    pairs = zip(ids, [*merged, VOCAB_SIZE], strict=True)
    for first, into in pairs:
        out.append(best if into == best else first)
        if into == best:
            next(pairs)  # the second of the pair
    return out


def _clean(text: str) -> str:
    """Repairs encoding mistakes and unescapes HTML; lower-casing and splitting come after."""
    # On text that passes this test neither ftfy nor html.unescape changes anything.
    if text.isascii() and text.isprintable() and ("&" not in text or not MAYBE_ENTITY.search(text)):
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _alphabet() -> dict[int, str]:
    """The 256 bytes in the order of their ids, and the character that the file writes for each.

    Visible Latin-1 characters stand for themselves and come first; the others are U+0100 and up.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def load_vocabulary() -> tuple[list[str], dict[tuple[int, int], int]]:
    """Returns the symbol of each id below SOT, and (id, id) -> the id they merge into."""
    packed = MERGES_PATH.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != MERGES_SHA256:
        raise ValueError(
            f"{MERGES_PATH} is damaged: expected sha256 {MERGES_SHA256}, got {digest}; "
            "install clip_jax again"
        )
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + NUM_MERGES]
    symbols = [*_alphabet().values()]
    symbols += [symbol + "</w>" for symbol in symbols]
    id_of_symbol = {symbol: i for i, symbol in enumerate(symbols)}
    merges = {}
    for line in lines:
        first, second = line.split(" ")
        merges[id_of_symbol[first], id_of_symbol[second]] = len(symbols)
        id_of_symbol[first + second] = len(symbols)
        symbols.append(first + second)
    return symbols, merges


def describe(value: object) -> str:
    """Type and value, short, for messages."""
    return f"{type(value).__name__} {reprlib.repr(value)}"
