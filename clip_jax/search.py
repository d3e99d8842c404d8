"""Finds pictures in a folder: by words, by another picture, or the ones that are there twice.

    python -m clip_jax.search --model=SOURCE --images=DIR --text="a red dress" [--text=...]
    python -m clip_jax.search --model=SOURCE --images=DIR --like=PICTURE
    python -m clip_jax.search --model=SOURCE --images=DIR --duplicates=0.97

The embeddings are kept in DIR/.clip_jax_index/ as `embeddings.npy` [N, E], unit length, and
`index.json`; the next time, only pictures that came or changed are embedded. The search is exact.
With millions of pictures, load the `.npy` into a search engine of your choice.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from clip_jax.data.labelled import Example, Labelled, images_below
from clip_jax.errors import DataError, UserError
from clip_jax.eval.charts import contact_sheet
from clip_jax.eval.embed import Encoder, decode
from clip_jax.eval.results import fingerprint
from clip_jax.loading import load, load_tokenizer
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import make_mesh, replicate

_FOLDER = ".clip_jax_index"
_CHUNK = 4096  # pictures that are compared with all others at once
_THUMBNAIL = 160


@dataclasses.dataclass(frozen=True)
class Index:
    """The pictures of a folder in the embedding space.

    Attributes:
        folder: of the pictures.
        files: relative to the folder.
        embeddings: unit length.
        unreadable: files that are no pictures.
    """

    folder: epath.Path
    files: tuple[str, ...]
    embeddings: Float[np.ndarray, "N E"]
    unreadable: tuple[str, ...] = ()

    def nearest(self, query: Float[np.ndarray, " E"], top: int) -> list[tuple[str, float]]:
        """The best files and their cosines, best first."""
        scores = self.embeddings @ query
        best = np.argsort(-scores, kind="stable")[:top]
        return [(self.files[each], float(scores[each])) for each in best]

    def duplicates(self, threshold: float) -> list[tuple[str, str, float]]:
        """Pairs of files whose cosine reaches the threshold, most alike first; exact."""
        pairs = []
        for start in range(0, len(self.files), _CHUNK):
            scores = self.embeddings[start : start + _CHUNK] @ self.embeddings[start:].T
            for row, column in np.argwhere(np.triu(scores >= threshold, k=1)):
                pairs.append((start + row, start + column, float(scores[row, column])))
        pairs.sort(key=lambda pair: -pair[2])
        return [(self.files[a], self.files[b], cosine) for a, b, cosine in pairs]


def build_index(encoder: Encoder, folder: epath.PathLike) -> Index:
    """Embeds the pictures of a folder, and keeps what it embeds there.

    Args:
        encoder: the model; an index of other weights is made anew.
        folder: local or gs://.

    Raises:
        DataError: no folder, or no picture in it.
    """
    folder = epath.Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    paths = images_below(folder)
    if not paths:
        raise DataError(f"{folder} holds no picture (.jpg, .png, .webp ...)")
    weights = fingerprint(encoder.model)
    known = _read(folder, weights)
    stamps = {
        path.relative_to(folder).as_posix(): [(stat := path.stat()).length, stat.mtime]
        for path in paths
    }
    fresh = [file for file, stamp in stamps.items() if known.get(file, (None, None))[0] != stamp]
    if fresh:
        known |= _embed(encoder, folder, fresh, stamps)
    known = {file: known[file] for file in stamps}
    if fresh:
        _write(folder, weights, known)
    files = tuple(file for file, (_, vector) in known.items() if vector is not None)
    if not files:
        raise DataError(f"none of the {len(paths)} pictures in {folder} can be read")
    embeddings = np.stack([known[file][1] for file in files])
    return Index(folder, files, embeddings, tuple(file for file in known if file not in files))


def _embed(encoder: Encoder, folder: epath.Path, files: Sequence[str], stamps) -> dict:
    def examples() -> Iterator[Example]:
        for file in files:
            yield Example(file, (folder / file).read_bytes)

    found = {file: (stamps[file], None) for file in files}
    try:
        embedded = encoder.source(Labelled(str(folder), examples))
    except DataError:
        return found  # none can be read
    for place, vector in zip(embedded.places, embedded.image, strict=True):
        found[files[place]] = (stamps[files[place]], vector)
    return found


def _read(folder: epath.Path, weights: str) -> dict:
    """File -> its stamp and its embedding, or None where it is no picture."""
    path = folder / _FOLDER / "index.json"
    if not path.exists():
        return {}
    index = json.loads(path.read_text())
    if index["weights"] != weights:
        return {}
    with (folder / _FOLDER / "embeddings.npy").open("rb") as file:
        embeddings = np.load(file)
    vectors = iter(embeddings)
    return {
        file: (stamp, next(vectors) if readable else None)
        for file, stamp, readable in index["files"]
    }


def _write(folder: epath.Path, weights: str, known: dict) -> None:
    directory = folder / _FOLDER
    directory.mkdir(parents=True, exist_ok=True)
    vectors = [vector for _, vector in known.values() if vector is not None]
    (directory / "index.json").unlink(missing_ok=True)  # no index without its embeddings
    with (directory / "embeddings.npy").open("wb") as file:
        np.save(file, np.stack(vectors) if vectors else np.zeros((0, 0), np.float32))
    files = [(file, stamp, vector is not None) for file, (stamp, vector) in known.items()]
    (directory / "index.json").write_text(json.dumps({"weights": weights, "files": files}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Searches, prints and draws."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="anything that clip_jax.load takes")
    parser.add_argument(
        "--tokenizer", help="its SentencePiece file, where it is not beside the weights"
    )
    parser.add_argument("--images", required=True, help="a folder of pictures, folders in it, too")
    parser.add_argument("--text", action="append", default=[], help="may be given several times")
    parser.add_argument("--like", help="a picture to look for others like it")
    parser.add_argument(
        "--duplicates", type=float, help="list pairs of at least this cosine; 0.97 finds copies"
    )
    parser.add_argument("--top", type=int, default=12, help="how many to show")
    parser.add_argument("--out", default="search.png", help="the contact sheet")
    asked = parser.parse_args(arguments)
    if not (asked.text or asked.like or asked.duplicates is not None):
        parser.error("nothing to look for: give --text, --like or --duplicates")
    try:
        _search(asked)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _search(asked: argparse.Namespace) -> None:
    mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    model, preprocess = load(asked.model)
    tokenizer = load_tokenizer(asked.model, file=asked.tokenizer)
    encoder = Encoder(replicate(model, mesh), preprocess, mesh, tokenizer=tokenizer)
    index = build_index(encoder, asked.images)
    print(f"{len(index.files)} pictures in {index.folder}")
    if index.unreadable:
        print(f"{len(index.unreadable)} could not be read, such as {index.unreadable[0]}")
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    for name, query in _queries(asked, encoder):
        found = index.nearest(query, asked.top)
        print("\n".join([f"\n{name}", *(f"  {cosine:.3f}  {file}" for file, cosine in found)]))
        rows.append((name, [(file, f"{cosine:.3f}") for file, cosine in found]))
    if asked.duplicates is not None:
        pairs = index.duplicates(asked.duplicates)
        print(f"\n{len(pairs)} pairs with a cosine of at least {asked.duplicates:g}")
        for first, second, cosine in pairs:
            print(f"  {cosine:.3f}  {first}  {second}")
        rows += [(f"{c:.3f}", [(a, a), (b, b)]) for a, b, c in pairs[: asked.top]]
    if rows:
        _draw(index, rows, preprocess, asked.out)
        print(f"\ncontact sheet  {asked.out}")


def _queries(asked: argparse.Namespace, encoder: Encoder) -> list[tuple[str, np.ndarray]]:
    queries: list[tuple[str, np.ndarray]] = []
    if asked.text:
        queries += zip(asked.text, encoder.texts(asked.text), strict=True)
    if asked.like:
        path = epath.Path(asked.like)
        pixels = decode(path.read_bytes(), encoder.preprocess) if path.exists() else None
        if pixels is None:
            raise DataError(f"{asked.like} is no picture that can be read")
        queries.append((f"like {asked.like}", encoder.images(pixels[None])[0]))
    return queries


def _draw(index: Index, rows, preprocess: Preprocess, out: str) -> None:
    thumbnail = dataclasses.replace(preprocess, size=_THUMBNAIL)
    pictures = []
    for title, files in rows:
        shown = []
        for file, label in files:
            pixels = decode((index.folder / file).read_bytes(), thumbnail)
            if pixels is not None:
                shown.append((pixels, label))
        pictures.append((title, shown))
    with epath.Path(out).open("wb") as file:
        contact_sheet(pictures).savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
