"""Images and texts per second, ours and open_clip's, side by side in one run.

    python benchmarks/encode.py                          # float32 on the CPU, bfloat16 on a GPU
    python benchmarks/encode.py --models=ViT-B/32 --batch-sizes=1

Random weights, the same in both programs; inputs lie on the device, outputs are waited for. The two
take turns, batch by batch, so that a busy machine disturbs both alike; both use all the cores there
are. What is compiled is compiled beforehand: ours by jax.jit, theirs as open_clip runs it (eager).
Prints medians, and the quartiles of the ratio of two neighbours in time. Needs open_clip_torch.
"""

import argparse
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from clip_jax.models import create_model, unstack
from clip_jax.tokenizer import EOT, SOT

# open_clip imports torchvision, whose operators may not match a CPU build of torch.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
import open_clip  # noqa: E402


def ours(name: str, dtype: str, batch: int) -> dict[str, Callable[[], object]]:
    model = create_model(name, dtype=jnp.dtype(dtype))
    if jax.default_backend() == "cpu":
        model = unstack(model)  # as `clip_jax.load` does
    size, context = model.config.vision.image_size, model.config.text.context_length
    images = jax.device_put(np.random.default_rng(0).normal(size=(batch, size, size, 3)))
    images = images.astype(jnp.float32)
    tokens = jnp.asarray(random_tokens(batch, context))
    image = jax.jit(lambda model, x: model.encode_image(x, normalize=True))
    text = jax.jit(lambda model, x: model.encode_text(x, normalize=True))
    return {
        "images": lambda: image(model, images).block_until_ready(),
        "texts": lambda: text(model, tokens).block_until_ready(),
    }


def theirs(name: str, dtype: str, batch: int) -> dict[str, Callable[[], object]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    model = open_clip.create_model(
        name.replace("/", "-") + "-quickgelu", precision=precision, device=device
    ).eval()
    size = open_clip.get_model_config(name.replace("/", "-"))["vision_cfg"]["image_size"]
    images = torch.randn(batch, 3, size, size, device=device, dtype=getattr(torch, dtype))
    tokens = torch.tensor(random_tokens(batch, 77), dtype=torch.long, device=device)

    def run(encode: Callable, inputs: torch.Tensor) -> None:
        with torch.inference_mode():
            encode(inputs, normalize=True)
            if device == "cuda":
                torch.cuda.synchronize()

    return {
        "images": lambda: run(model.encode_image, images),
        "texts": lambda: run(model.encode_text, tokens),
    }


def random_tokens(batch: int, context: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(1, SOT, (batch, context)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = SOT, EOT
    return tokens


def race(pair: tuple[Callable, Callable], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each call of the two, in turns, after a warm-up."""
    for call in pair:
        call()
        call()
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for i, call in enumerate(pair):
            before = time.perf_counter()
            call()
            taken[i].append(time.perf_counter() - before)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="ViT-B/32,RN50")
    parser.add_argument("--batch-sizes", default="1,64")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--seconds", type=float, default=20, help="of each comparison")
    args = parser.parse_args()

    torch.set_num_threads(os.cpu_count() or 1)
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {args.dtype}; "
        f"jax {jax.__version__}, torch {torch.__version__}, open_clip {open_clip.__version__}, "
        f"Python {platform.python_version()}.\n"
        "Per second, medians; the ratio's median and quartiles.\n\n"
        "| Model | Batch | What | open_clip | clip_jax | ratio |\n|---|---|---|---|---|---|"
    )
    for name in args.models.split(","):
        for batch in map(int, args.batch_sizes.split(",")):
            us, them = ours(name, args.dtype, batch), theirs(name, args.dtype, batch)
            for what in us:
                own, other = race((us[what], them[what]), args.seconds)
                ratios = [b / a for a, b in zip(own, other, strict=True)]
                low, mid, high = statistics.quantiles(ratios, n=4)
                per_second = [f"{batch / statistics.median(taken):,.1f}" for taken in (other, own)]
                spread = f"{mid:.2f} ({low:.2f} to {high:.2f})"
                print(
                    "|", " | ".join([name, str(batch), what, *per_second, spread]), "|", flush=True
                )


if __name__ == "__main__":
    main()
