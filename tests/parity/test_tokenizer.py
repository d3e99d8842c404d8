"""Our token ids against open_clip's, on hand-picked and on random strings of every kind.

As a script (needs torch and open_clip_torch), it fuzzes for longer, or records the goldens anew:

    python tests/parity/test_tokenizer.py --seed=7 --strings=500000
    python tests/parity/test_tokenizer.py --record
"""

import argparse
import functools
import html.entities
import importlib.metadata
import json
import random
import sys
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from clip_jax import tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizer.json"
STRINGS_PER_SEED = 25_000

EMOJI = [
    "\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1eb\U0001f1f7", "\U0001f44d\U0001f3ff", "\u2764\ufe0f\u200d\U0001f525", "#\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\u200d", "\ufe0f",
]  # fmt: skip
SPECIAL = ["<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>", "</w>", "<pad>"]
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "\u2019s", "'\u017f", "''", "'", "`s"]
SPACES = [c for c in map(chr, range(0x110000)) if c.isspace()] + ["\u200b", "\u180e", "\u2060"]
CONTROLS = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\ufeff", "\ufffc", "\u206a"]
CONTROLS += ["\x1b[1m", "\x1b[38;5;1m", "\x1b["]
TRICKY = [*"\u0130\u0131\u00df\u1e9e\u03a3\u03c3\u03c2\u017f\u212a\u212b\u0345\u0149\u01f0\u1e96"]
TRICKY += [*"\ufb00\ufb05\ufb13\uff76\uff9e\uffa1\u00aa\u00b5\u2126\u00ad\ufffd\u1fb3\u24b6\u2163"]
TRICKY += [*"\u0300\u0301\u0327\u094d\u20dd\u1100\u1161\u11a8\u0f71\u302a"]
SURROGATES = ["\ud800", "\udbff", "\udc00", "\udfff", "\ud83d\ude00", "\ud83d"]
ENCODINGS = ["latin-1", "cp1252", "cp1250", "cp1251", "cp437", "mac-roman", "iso8859-2"]
WORDS = (
    "a an the of in on with and photo picture man woman dog cat skateboard riding red BLUE Vintage "
    "Nike iPhone New York 2019 4k HD vs. S/M/L no.1 café jalapeño Ölgemälde stock-photo e_mail "
    "Москва Ελλάδα 東京タワー 서울 القاهرة हिन्दी กรุงเทพ Việt-Nam"
)


@functools.cache
def codepoints_by_script() -> list[list[str]]:
    """Every assigned codepoint, grouped by the first word of its name: by script, near enough."""
    scripts: dict[str, list[str]] = {}
    for char in map(chr, range(0x110000)):
        if name := unicodedata.name(char, ""):
            scripts.setdefault(name.split("-")[0].split()[0], []).append(char)
    return list(scripts.values())


def random_string(rng: random.Random) -> str:
    """One to six pieces of random kinds, joined by a space, by nothing or by something odd."""
    pieces = [rng.choice(PIECES)(rng) for _ in range(rng.choice((1, 1, 2, 3, 6)))]
    joint = rng.choice((" ", " ", "", rng.choice(SPACES), rng.choice(CONTROLS)))
    return joint.join(pieces)


def a_word(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 8)))


def a_script(rng: random.Random) -> str:
    return "".join(rng.choices(rng.choice(codepoints_by_script()), k=rng.randint(1, 12)))


def any_codepoints(rng: random.Random) -> str:
    top = rng.choice((0x80, 0x100, 0x800, 0x3000, 0x10000, 0x20000, 0x110000))
    return "".join(chr(rng.randrange(top)) for _ in range(rng.randint(1, 12)))


def printable_ascii(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 30)))


def punctuation(rng: random.Random) -> str:
    return "".join(rng.choices("&<>#;'\"!?.,-_/ amplt1x", k=rng.randint(1, 12)))


def an_entity(rng: random.Random) -> str:
    number = rng.choice((rng.randrange(300), rng.randrange(0x120000), rng.randrange(10**12)))
    name = rng.choice(list(html.entities.html5)).rstrip(";")
    body = rng.choice((name, name, name.upper(), f"#{number}", f"#x{number:x}", f"#X{number:X}"))
    nested = "amp;" * rng.choice((0, 0, 0, 1, 2, 3))
    return "&" + nested + body + rng.choice((";", ";", ";", "", " ;", "=", "1"))


def mojibake(rng: random.Random) -> str:
    text = rng.choice((a_script, a_word, lambda rng: rng.choice(EMOJI + CONTRACTIONS)))(rng)
    for _ in range(rng.choice((1, 1, 1, 2))):
        codec = rng.choice(ENCODINGS)
        text = text.encode("utf-8", "replace").decode(codec, rng.choice(("replace", "ignore")))
    return text.replace("\xa0", " ") if rng.random() < 0.2 else text


def special_text(rng: random.Random) -> str:
    text = rng.choice(SPECIAL)
    i = rng.randrange(len(text))
    change = rng.choice((str.lower, str.lower, str.lower, str.upper, str.title, html.escape, None))
    if change:
        return change(text)
    return text[:i] + rng.choice(("", " ", "\u017f", "<", "\u200b")) + text[i + 1 :]


def one_of(*choices: str):
    return lambda rng: "".join(rng.choices(choices, k=rng.randint(1, 4)))


PIECES = [
    a_word, a_word, a_script, a_script, any_codepoints, printable_ascii, punctuation, an_entity,
    an_entity, mojibake, mojibake, special_text, one_of(*EMOJI), one_of(*CONTRACTIONS, *"ABCab1"),
    one_of(*SPACES), one_of(*CONTROLS), one_of(*TRICKY, *"aAsS1'"), one_of(*SURROGATES, "a"),
]  # fmt: skip


def random_strings(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_string(rng) for _ in range(count)]


@functools.cache
def open_clip_tokenizer():
    pytest.importorskip("torch", reason="parity with open_clip needs torch: pip install torch")
    # torchvision may not match a CPU build of torch; nothing here needs its operators.
    sys.modules.setdefault(
        "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
    )
    return pytest.importorskip(
        "open_clip", reason="parity with open_clip needs it: pip install open_clip_torch"
    ).SimpleTokenizer()


def differences(texts: list[str]) -> list[str]:
    ours, theirs = tokenizer.Tokenizer(), open_clip_tokenizer()
    return [text for text in texts if ours.encode(text) != theirs.encode(text)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_strings_have_open_clips_ids(seed):
    assert differences(random_strings(seed, STRINGS_PER_SEED)) == []


@pytest.mark.slow
def test_every_codepoint_has_open_clips_ids():
    runs = ["".join(map(chr, range(i, i + 64))) for i in range(0, 0x110000, 64)]
    assert differences(runs) == []


def test_goldens_are_open_clips():
    theirs = open_clip_tokenizer()
    assert [c for c in read_goldens() if theirs.encode(c[0]) != c[1]] == []


def test_batches_are_open_clips():
    texts = [text for text, _ in read_goldens()]
    expected = open_clip_tokenizer()(texts).numpy()
    np.testing.assert_array_equal(tokenizer.Tokenizer()(texts, truncate=True), expected)


def test_decoding_is_open_clips():
    ours, theirs, rng = tokenizer.Tokenizer(), open_clip_tokenizer(), random.Random(0)
    rows = [ids for _, ids in read_goldens()]
    rows += [rng.choices(range(tokenizer.VOCAB_SIZE), k=rng.randint(0, 8)) for _ in range(2000)]
    rows += [rng.choices(theirs.encode("< / w > é")[:4], k=9) for _ in range(100)]
    assert [ids for ids in rows if ours.decode(ids) != theirs.decode(ids)] == []


def read_goldens() -> list[list]:
    return json.loads(GOLDENS.read_text(encoding="utf-8"))["cases"]


def record() -> None:
    """Writes the ids of the goldens' strings anew. To add a string, add [string, []] and record."""
    theirs = open_clip_tokenizer()
    about = {
        "cases": "[string, open_clip.SimpleTokenizer().encode(string)]",
        "recorded_by": "python tests/parity/test_tokenizer.py --record",
        "with": {name: importlib.metadata.version(name) for name in ("open_clip_torch", "ftfy")},
    }
    lines = [json.dumps([text, theirs.encode(text)]) for text, _ in read_goldens()]
    body = ",\n".join(lines)
    GOLDENS.write_text(f'{{"about": {json.dumps(about)},\n"cases": [\n{body}\n]}}\n')
    print(f"recorded {len(lines)} strings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.record:
        record()
    else:
        different = differences(random_strings(args.seed, args.strings))
        print(f"seed {args.seed}: {len(different)} of {args.strings} strings differ")
        print(*map(ascii, different[:10]), sep="\n")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
