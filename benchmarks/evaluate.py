"""Zero-shot evaluation beside CLIP_benchmark's, in one run; and retrieval, exact.

    python benchmarks/evaluate.py --images=DIR     # DIR/test/CLASS/*.jpg

- zero-shot from files to predictions: pictures are read, decoded and embedded, the classes' prompts
  too. The model is in memory beforehand. "first" includes what XLA compiles; "again" is the median
  of the runs after it, what the next data set of a suite costs.
- ImageNet's classifier: 1,000 classes in 80 templates, of which the first --classes are built.
- retrieval both ways among 5,000 pictures and 25,000 captions that are embedded already: ours
  alone.

Both programs have the same random weights of a ViT-B/32, in float32, and all cores;
CLIP_benchmark's loader has a worker for each. They take turns. What CLIP_benchmark calls accuracy
does not run under NumPy 2.4, so it stops at the logits, and ours computes its metrics on top. Needs
open_clip_torch and clip-benchmark.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import save_file

import clip_jax
from clip_jax.eval import Encoder, Options, evaluate
from clip_jax.eval.opening import find
from clip_jax.eval.registry import datasets
from clip_jax.eval.tasks.retrieval import rank_both_ways
from clip_jax.sharding import make_mesh, replicate

# open_clip imports torchvision, whose operators may not match a CPU build of torch.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
import open_clip  # noqa: E402
from clip_benchmark.metrics import zeroshot_classification  # noqa: E402


class Examples(torch.utils.data.Dataset):
    """Files and their labels, as CLIP_benchmark takes them."""

    def __init__(self, files: list[tuple[str, int]], size: int):
        self._files = files
        self._transform = open_clip.image_transform(size, is_train=False)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self._files[index]
        with Image.open(path) as picture:
            return self._transform(picture), label


def same_model(name: str) -> tuple[torch.nn.Module, clip_jax.CLIP, clip_jax.Preprocess]:
    theirs = open_clip.create_model(name.replace("/", "-") + "-quickgelu").eval()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        save_file(theirs.state_dict(), path)
        return theirs, *clip_jax.load(path, model=name)


def in_turns(repeats: int, *programs: Callable[[], object]) -> list[list[float]]:
    """Seconds of each run of each program."""
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for program, taken in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            program()
            taken.append(time.perf_counter() - start)
    return seconds


def row(what: str, count: int, unit: str, ours: list[float], theirs: list[float]) -> str:
    """Rates of the runs after the first, and how the neighbours in time compare."""
    ratios = sorted(other / own for own, other in zip(ours[1:], theirs[1:], strict=True))
    rates = [f"{count / statistics.median(taken[1:]):,.1f}" for taken in (theirs, ours)]
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {what} | {unit} | {' | '.join(rates)} | {theirs[0] / ours[0]:.2f} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="a folder with test/CLASS/*")
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10, help="of ImageNet's, for the classifier")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()

    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    theirs, model, preprocess = same_model(args.model)
    model = replicate(model, mesh)
    tokenizer = open_clip.get_tokenizer(args.model.replace("/", "-"))

    def encoder() -> Encoder:  # a new one, which has no class vectors yet
        return Encoder(model, preprocess, mesh, args.batch_size)

    images = Path(args.images).resolve()
    (found,) = find(images.name, str(images.parent))
    source = found.split("test")
    files = [(example.where, int(example.label)) for example in source.examples()]
    names = [entry.prompts[0] for entry in found.classes(source).entries]
    loader = torch.utils.data.DataLoader(
        Examples(files, preprocess.size), args.batch_size, num_workers=cores
    )

    def classify(names: list[str], templates: tuple[str, ...]) -> torch.Tensor:
        return zeroshot_classification.zero_shot_classifier(
            theirs, tokenizer, names, [t.replace("{}", "{c}") for t in templates], "cpu", amp=False
        )

    def zero_shot_of_theirs() -> None:
        classifier = classify(names, found.entry.templates)
        zeroshot_classification.run_classification(theirs, classifier, loader, "cpu", amp=False)

    def zero_shot() -> None:
        evaluate(
            encoder(),
            images.name,
            tasks=["zero_shot"],
            data_dir=str(images.parent),
            options=Options(intervals=False),
        )

    imagenet = datasets()["imagenet"]
    some = imagenet.classes[: args.classes]

    print(
        f"{args.model}, {jax.devices()[0].device_kind}, {cores} cores; jax {jax.__version__}, "
        f"torch {torch.__version__}, open_clip {open_clip.__version__}, "
        f"Python {platform.python_version()}.\n\n"
        "| What | per second | CLIP_benchmark | clip_jax | ratio, first | ratio, again |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    taken = in_turns(args.repeats, zero_shot, zero_shot_of_theirs)
    print(row(f"zero-shot, {len(names)} classes", len(files), "pictures", *taken), flush=True)
    taken = in_turns(
        args.repeats,
        lambda: encoder().class_vectors(some, imagenet.templates),
        lambda: classify([entry.prompts[0] for entry in some], imagenet.templates),
    )
    prompts = sum(len(entry.prompts) for entry in some) * len(imagenet.templates)
    print(row(f"{len(some)} ImageNet classes", prompts, "prompts", *taken), flush=True)

    random = np.random.default_rng(0)
    image, text = (random.standard_normal((n, 512), np.float32) for n in (5_000, 25_000))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    owner = np.repeat(np.arange(5_000), 5)
    (taken_alone,) = in_turns(args.repeats, lambda: rank_both_ways(image, text, owner, mesh))
    again = sorted(taken_alone[1:])
    print(
        f"\nRetrieval of 5,000 x 25,000: first {taken_alone[0]:.2f} s, again "
        f"{statistics.median(again):.2f} s ({again[0]:.2f} to {again[-1]:.2f})."
    )


if __name__ == "__main__":
    main()
