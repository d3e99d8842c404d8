"""Captions per second of our tokenizer and open_clip's, side by side in one run.

    python benchmarks/tokenizer.py                          # 100,000 made-up captions
    python benchmarks/tokenizer.py --captions=captions.jsonl

The captions are made from the vocabulary itself: words drawn by Zipf's law in the order of their
ids, which is that of their frequency, and put into sentences as in COCO and into lines as in alt
texts (names, numbers, sizes, addresses, made-up words). Some hold characters beyond ASCII or HTML
entities: these go through ftfy, which takes the same time in both, so their share matters.

"cold" is the first pass of a new tokenizer, "warm" the second pass over the same captions; "encode"
gives lists of ids, "batches" arrays of 1,024 x 77. The two take turns every 4,096 captions, and the
clock is the processor's, so that a busy machine disturbs little. Needs open_clip_torch.
"""

import argparse
import gc
import itertools
import json
import platform
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable

from clip_jax import tokenizer

# open_clip imports torchvision, whose operators may not match a CPU build of torch.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
import open_clip  # noqa: E402

BATCH = 1024
BEYOND_ASCII = [
    " \u2013 ", "\u2019s ", " “vintage” ", "…", "® ", "™", " café ", " München ", " São Paulo ",
    " €49 ", " 30°C ", " ❤️", " 😀", " Москва ", " 東京 ", " \u00d7 ", "\u00a0", " © 2019 ",
]  # fmt: skip
ENTITIES = [" &amp; ", "&#39;s ", " &quot;new&quot; ", "&nbsp;", " &eacute;t&eacute; ", " &ndash; "]


def make_captions(count: int, seed: int, beyond_ascii: float, entities: float) -> list[str]:
    rng = random.Random(seed)
    tok = tokenizer.Tokenizer()
    decoded = (tok.decode([i]) for i in itertools.chain(range(256, 512), range(512, tokenizer.SOT)))
    words = [t[:-1] for t in decoded if t.endswith(" ") and t.isascii() and t[:-1].isalpha()]
    cumulative = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))

    def draw(k: int) -> list[str]:
        drawn = rng.choices(words, cum_weights=cumulative, k=k)
        # One word in 40 is in no vocabulary: a name, a misspelling, a compound.
        return [w + rng.choice(words) if rng.random() < 1 / 40 else w for w in drawn]

    def sentence() -> str:
        text = " ".join(draw(rng.randint(7, 14)))
        return text.capitalize() + rng.choice((".", ".", ".", "", " ."))

    def alt_text() -> str:
        def number() -> str:
            return str(rng.randint(1, 10 ** rng.randint(1, 4)))

        pieces = draw(rng.randint(3, 10))
        pieces = [w.title() if rng.random() < 0.5 else w for w in pieces]
        for _ in range(rng.randint(0, 3)):
            a, b = draw(2)
            extra = rng.choice((
                number(), f"{number()}x{number()}", f"({a})", f"{a}, {b},", "-", "|", "&", f"#{a}",
                f"{a}-{b}", f"{a}'s", f"${number()}.99", f"www.{a}{b}.com", f"{a}/{b}", f"{a}: {b}",
                f"IMG_{number()}.jpg", f"{a.upper()}-{number()}", f'"{a}"', f"{number()}%", f"{a}!",
            ))  # fmt: skip
            pieces.insert(rng.randint(0, len(pieces)), extra)
        return " ".join(pieces)

    def caption() -> str:
        text = rng.choice((sentence, alt_text))()
        at = rng.randint(0, len(text))
        chance = rng.random()
        if chance < beyond_ascii:
            return text[:at] + rng.choice(BEYOND_ASCII) + text[at:]
        if chance < beyond_ascii + entities:
            return text[:at] + rng.choice(ENTITIES) + text[at:]
        return text

    return [caption() for _ in range(count)]


def read_captions(path: str) -> list[str]:
    """One caption a line, or one JSON object a line with "captions": [...] or "caption": "..."."""
    captions: list[str] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("{"):
                record = json.loads(line)
                captions += record.get("captions") or [record["caption"]]
            else:
                captions.append(line.rstrip("\n"))
    return captions


def encode(tok: Callable, captions: list[str]) -> None:
    for caption in captions:
        tok.encode(caption)


def batches(tok: Callable, captions: list[str]) -> None:
    for start in range(0, len(captions), BATCH):
        chunk = captions[start : start + BATCH]
        tok(chunk, truncate=True) if isinstance(tok, tokenizer.Tokenizer) else tok(chunk)


def race(work: Callable, toks: list[Callable], captions: list[str]) -> list[float]:
    """Seconds of processor time that each takes; they take turns every few batches."""
    taken = [0.0] * len(toks)
    gc.collect()
    for start in range(0, len(captions), 4 * BATCH):
        part = captions[start : start + 4 * BATCH]
        for i, tok in enumerate(toks):
            before = time.process_time()
            work(tok, part)
            taken[i] += time.process_time() - before
    return taken


def spread(values: Iterable[float], digits: int) -> str:
    values = sorted(values)
    low, mid, high = (
        f"{v:,.{digits}f}" for v in (values[0], statistics.median(values), values[-1])
    )
    return f"{mid} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", help="a file to take the captions from")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beyond-ascii", type=float, default=0.08, help="share of captions")
    parser.add_argument("--entities", type=float, default=0.02, help="share of captions")
    args = parser.parse_args()
    if args.captions:
        captions = read_captions(args.captions)
    else:
        captions = make_captions(args.count, args.seed, args.beyond_ascii, args.entities)

    ours, theirs = tokenizer.Tokenizer(), open_clip.SimpleTokenizer()
    different = sum(ours.encode(c) != theirs.encode(c) for c in captions)
    chunks = [chunk for c in captions for chunk in c.lower().split()]
    plain = sum(c.isascii() and "&" not in c for c in captions) / len(captions)
    print(
        f"{len(captions):,} captions, {len(chunks):,} chunks ({len(set(chunks)):,} distinct), "
        f"{plain:.0%} plain ASCII; {different} differ in their ids.\n"
        f"Python {platform.python_version()}, open_clip {open_clip.__version__}; captions per "
        f"second of processor time,\nmedian (least to most) of {args.repeats} repeats.\n"
    )
    times: dict[str, list[list[float]]] = {}
    for _ in range(args.repeats):
        for work in (encode, batches):
            toks = [open_clip.SimpleTokenizer(), tokenizer.Tokenizer()]
            for state in ("cold", "warm"):
                row = f"{work.__name__}, {state}"
                times.setdefault(row, []).append(race(work, toks, captions))
    print("|  | open_clip | clip_jax | ratio |\n|---|---|---|---|")
    for row, repeats in times.items():
        print(
            f"| {row} | {spread((len(captions) / them for them, _ in repeats), 0)} "
            f"| {spread((len(captions) / us for _, us in repeats), 0)} "
            f"| {spread((them / us for them, us in repeats), 1)} |"
        )


if __name__ == "__main__":
    main()
