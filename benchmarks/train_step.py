"""Seconds of a train step, ours and open_clip's, side by side in one run.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
        python benchmarks/train_step.py                               # the CPU: ViT-B/32, RN50
    python benchmarks/train_step.py --models ViT-B/16 --batch 256 \\
        --dtype bfloat16 --compile                                    # a GPU

Both train the same architecture on the same batch of random pixels and ids, from uint8 images to
updated weights: normalise, both towers, the contrastive loss, gradients, AdamW, the cap on the
logit scale. open_clip runs as its own training script would: `create_model`, `ClipLoss`, AdamW with
the same split into decayed and other weights (fused on a GPU), autocast for bfloat16,
`torch.compile` with --compile. The two take turns, a few steps each, so that whatever else the
machine does meets both; a turn's first step finds memory as the other left it, and is not counted.
A GPU holds both at once. Needs open_clip_torch; loads no TensorFlow.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is torch's, too

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.chips import chip_of
from clip_jax.config import default_config
from clip_jax.data.batch import Batch
from clip_jax.models import model_config
from clip_jax.models.flops import training_flops
from clip_jax.optim import learning_rate_schedule, make_optimizer
from clip_jax.preprocess import MEAN, STD, Preprocess
from clip_jax.sharding import make_mesh, shard_batch
from clip_jax.training.gradients import make_gradients
from clip_jax.training.state import abstract_model, abstract_state, initial_state
from clip_jax.training.step import make_train_step

# open_clip imports torchvision, whose operators may not match a CPU build of torch.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
import open_clip  # noqa: E402
import torch  # noqa: E402

THEIR_NAMES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
}

Step = Callable[[], None]  # returns when the step is done


def random_batch(name: str, rows: int) -> Batch:
    config, random = model_config(name), np.random.default_rng(0)
    size, length = config.vision.image_size, config.text.context_length
    tokens = np.zeros((rows, length), np.int32)
    for row, end in zip(tokens, random.integers(5, length, rows), strict=True):
        row[: end + 1] = [49406, *random.integers(1, 49406, end - 1), 49407]
    return Batch(random.integers(0, 256, (rows, size, size, 3), np.uint8), tokens)


def our_step(name: str, batch: Batch, args: argparse.Namespace) -> Step:
    config = default_config()
    mesh = make_mesh(config.mesh)
    architecture, preprocess = model_config(name), Preprocess(model_config(name).vision.image_size)
    model = abstract_model(architecture, args.dtype, args.remat, args.unroll)
    schedule = learning_rate_schedule(1e-4, 0, 10_000)
    optimizer = make_optimizer(config.optim, schedule)
    target = abstract_state(model, optimizer, mesh)
    step = make_train_step(make_gradients(model, preprocess, mesh), optimizer, schedule, target)
    state, ours = initial_state(architecture, optimizer, target, 0), shard_batch(batch, mesh)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, ours)
        assert np.isfinite(float(metrics["loss"]))

    return run


def their_step(name: str, batch: Batch, args: argparse.Namespace) -> Step:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_clip.create_model(THEIR_NAMES[name], device=device)
    model.train()
    model.set_grad_checkpointing(args.remat != "none")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=device.type == "cuda",
    )
    loss_of = open_clip.ClipLoss()
    forward = torch.compile(model) if args.compile else model
    images = torch.from_numpy(batch.image).to(device).permute(0, 3, 1, 2)
    tokens = torch.from_numpy(batch.tokens).long().to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))

    def run() -> None:
        pixels = (images.float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            image, text, scale = forward(pixels, tokens)[:3]
            loss = loss_of(image, text, scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        assert np.isfinite(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def warm_up(step: Step) -> None:
    for _ in range(2):
        step()


def seconds(step: Step) -> float:
    before = time.perf_counter()
    step()
    return time.perf_counter() - before


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def compare(name: str, args: argparse.Namespace) -> str:
    batch = random_batch(name, args.batch)
    contestants = {"ours": our_step(name, batch, args), "theirs": their_step(name, batch, args)}
    with ThreadPoolExecutor(1) as pool:  # torch compiles for the thread that it runs in: not there
        compiled = pool.submit(warm_up, contestants["ours"])
        warm_up(contestants["theirs"])
        compiled.result()
    times: dict[str, list[float]] = {which: [] for which in contestants}
    for _ in range(args.rounds):
        for which, step in contestants.items():
            step()
            times[which] += [seconds(step) for _ in range(args.steps)]
    ours, theirs = times["ours"], times["theirs"]
    ratios = [them / us for us, them in zip(sorted(ours), sorted(theirs), strict=True)]
    flops = training_flops(model_config(name)) * args.batch / statistics.median(ours)
    share = ""
    if chip := chip_of(jax.devices()[0]):
        share = (
            f", {flops / chip.peak_flops:.0%} of the peak, {flops / ceiling():.0%} of the ceiling"
        )
    return (
        f"| {name} | {spread(theirs, 4)} | {spread(ours, 4)} | {spread(ratios, 2)} "
        f"| {flops / 1e9:,.0f}{share} |"
    )


@functools.cache
def ceiling(size: int = 8192) -> float:
    """FLOP/s of a large product of bfloat16 matrices."""
    x, y = (jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16) for n in range(2))
    multiply = jax.jit(jnp.matmul)

    def ten() -> None:
        for _ in range(10):
            product = multiply(x, y)
        product.block_until_ready()

    ten()
    return 10 * 2 * size**3 / statistics.median(seconds(ten) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B/32", "RN50"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--remat", default="none", help="ours; theirs checkpoints unless it is none"
    )
    parser.add_argument("--unroll", type=int, default=24, help="of our loop over layers")
    parser.add_argument("--compile", action="store_true", help="torch.compile for theirs")
    parser.add_argument("--steps", type=int, default=3, help="in one turn, that count")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, "
        f"open_clip {open_clip.__version__}; batch {args.batch}, {args.dtype}. Seconds a step, "
        f"median (least to most) of {args.rounds * args.steps}.\n\n"
        "|  | open_clip | clip_jax | open_clip / clip_jax | clip_jax, model GFLOP/s |\n"
        "|---|---|---|---|---|"
    )
    for name in args.models:
        print(compare(name, args), flush=True)
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main()
