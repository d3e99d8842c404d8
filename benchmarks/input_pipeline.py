"""Samples a second of the training data, ours and open_clip's WebDataset loader, in one run.

    python benchmarks/input_pipeline.py --images DIR [--images DIR ...] [--size 224] [--rounds 3]

The JPEGs below DIR (without it, the few photographs that the dependencies carry) are written into
shards, tar and TFRecord, with captions; everybody reads the same ones, with tokens and the same
random resized crop (0.9 to 1 of the area), with as many workers or threads as there are cores. Each
contender runs in a process of its own, by turns, from the disk's cache. `bare decoding` is
TensorFlow's JPEG decoder over pictures in memory. Beside samples a second, the CPU time that a
sample takes: it says the same on a machine that has other things to do. Needs open_clip_torch and
webdataset, 0.2.86 at most as open_clip asks.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONTENDERS = ("bare decoding", "open_clip", "tar", "tfrecord", "tar, device")
BATCH = 64
SAMPLES = 2_400  # in the shards, photographs repeated
SHARDS = 8
CAPTION = "A photograph of several people in front of a building, taken in the late afternoon."


def photographs(folders: list[str]) -> list[bytes]:
    """The JPEGs below some folders, or those that the dependencies carry."""
    if not folders:
        import matplotlib
        import sklearn

        folders = [
            str(Path(sklearn.__file__).parent / "datasets" / "images"),
            str(Path(matplotlib.get_data_path()) / "sample_data"),
        ]
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.jp*g"))
    if not found:
        sys.exit(f"no JPEG below {', '.join(folders)}")
    return [path.read_bytes() for path in found]


def write(pictures: list[bytes], folder: Path) -> None:
    """Tars and TFRecords of the same samples."""
    from clip_jax.data.write import main

    per_shard = SAMPLES // SHARDS
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for n in range(shard * per_shard, (shard + 1) * per_shard):
                files = {"jpg": pictures[n % len(pictures)], "txt": f"{CAPTION} {n}".encode()}
                for extension, content in files.items():
                    info = tarfile.TarInfo(f"{n:09d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    main([f"{folder}/*.tar", f"--out={folder}/tfrecord", "--format=tfrecord"])


def ours(folder: Path, kind: str, size: int, *, on_device: bool = False) -> Iterator[int]:
    """Rows of batch after batch."""
    from clip_jax.config import default_config
    from clip_jax.data.batches import train_batches
    from clip_jax.data.order import Order
    from clip_jax.data.sources import open_mixture

    config = default_config()
    config.train.batch_size = BATCH
    config.data.update(
        train=f"{folder}/*.tar" if kind == "tar" else f"{folder}/tfrecord/*.tfrecord",
        resized_crop=(0.9, 1.0),
    )
    mixture = open_mixture(config.data.train, config.data)
    order = Order.start(mixture, 0, config.data.streams, config.data.shuffle_bytes)
    for taken in train_batches(mixture, order, config, size, 77, on_device=on_device):
        yield len(taken.batch.tokens)


def bare(folder: Path, cores: int) -> Iterator[int]:
    """Decoding alone."""
    import tensorflow as tf

    from clip_jax.data.pipeline import pipeline_options

    pictures = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".jpg")]
            pictures += [tar.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    decoded = tf.data.Dataset.from_tensor_slices(pictures).repeat()
    decoded = decoded.map(
        lambda image: tf.shape(tf.io.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE"))[
            0
        ],
        num_parallel_calls=cores,
    ).batch(BATCH)
    for batch in decoded.with_options(pipeline_options(cores)).prefetch(1):
        yield len(batch)


def theirs(folder: Path, cores: int, size: int) -> Iterator[int]:
    """open_clip's training loader, as `open_clip_train.main` makes it."""
    import types

    # open_clip imports torchvision, whose operators may not match a CPU build of torch.
    sys.modules.setdefault(
        "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
    )
    import open_clip
    from open_clip_train.data import get_wds_dataset

    args = argparse.Namespace(
        train_data=f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar",
        train_num_samples=SAMPLES * 1000,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        workers=cores,
        batch_size=BATCH,
        world_size=1,
    )
    transform = open_clip.image_transform(size, is_train=True)
    data = get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    for images, _ in data.dataloader:
        yield len(images)


def cpu_seconds(group: int) -> float:
    """User and system time of all processes of a group, so far."""
    ticks = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[int], seconds: float) -> tuple[float, float]:
    """Samples a second, and CPU seconds a sample, after everything is warm."""
    for _ in itertools.islice(batches, 1 + 1_200 // BATCH):
        pass
    start, used, samples = time.perf_counter(), cpu_seconds(os.getpgrp()), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        samples += next(batches)
    return samples / elapsed, (cpu_seconds(os.getpgrp()) - used) / samples


def contend(name: str, folder: Path, size: int, seconds: float) -> None:
    """Prints what one contender reaches."""
    cores = len(os.sched_getaffinity(0))
    makers: dict[str, Callable[[], Iterator[int]]] = {
        "bare decoding": lambda: bare(folder, cores),
        "open_clip": lambda: theirs(folder, cores, size),
        "tar": lambda: ours(folder, "tar", size),
        "tfrecord": lambda: ours(folder, "tfrecord", size),
        "tar, device": lambda: ours(folder, "tar", size, on_device=True),
    }
    print(json.dumps(measure(makers[name](), seconds)), flush=True)
    os._exit(0)  # workers are not waited for


def cores_per_chip(on_host: float, on_device: float) -> str:
    """A table for docs/data.md: each program of docs/pods.json, at the rate its chip cannot beat.

    Args:
        on_host: CPU seconds a sample, resized on the host.
        on_device: likewise, on the device.
    """
    pods = json.loads((Path(__file__).parents[1] / "docs" / "pods.json").read_text())
    lines = [
        "| Model | Topology | examples/s a chip, at most | cores a chip, resize on the host "
        "| on the device |",
        "|---|---|---|---|---|",
    ]
    for pod in pods.values():
        if rate := pod.get("examples_per_second_per_chip_bound"):
            cores = " | ".join(f"{rate * cpu:.1f}" for cpu in (on_host, on_device))
            lines.append(f"| {pod['model']} | {pod['topology']} | {rate:,.0f} | {cores} |")
    return "\n".join(lines)


def main() -> None:
    """Everybody in turn, several rounds; a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", action="append", default=[], help="folder of JPEGs")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender, Path(args.folder), args.size, args.seconds)
    pictures = photographs(args.images)
    cores = len(os.sched_getaffinity(0))
    results: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        write(pictures, Path(folder))
        for _, name in itertools.product(range(args.rounds), CONTENDERS):
            words = [sys.executable, __file__, f"--contender={name}", f"--folder={folder}"]
            done = subprocess.run(
                [*words, f"--size={args.size}", f"--seconds={args.seconds}"],
                stdout=subprocess.PIPE,
                start_new_session=True,
                check=True,
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{len(pictures)} photographs, {args.size} pixels, {cores} cores, medians (range)")
    base = statistics.median(cpu for _, cpu in results["open_clip"])
    for name, rounds in results.items():
        rates = sorted(rate / cores for rate, _ in rounds)
        cpu = statistics.median(cpu for _, cpu in rounds)
        print(
            f"{name:14} {statistics.median(rates):7.1f} samples/s/core "
            f"({rates[0]:.1f}-{rates[-1]:.1f})  {1e3 * cpu:6.2f} ms CPU a sample  "
            f"{base / cpu:5.2f}x open_clip by CPU"
        )
    costs = (statistics.median(cpu for _, cpu in results[name]) for name in ("tar", "tar, device"))
    print(f"\n{cores_per_chip(*costs)}")


if __name__ == "__main__":
    main()
