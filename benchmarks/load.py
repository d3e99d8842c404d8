"""Seconds and peak memory of loading a ViT-L/14, ours and Transformers', each in its own process.

    python benchmarks/load.py [--model=ViT-L/14] [--repeats=5]

A folder in Transformers' form is made of random weights, in float32, and read by `clip_jax.load`
and by `CLIPModel.from_pretrained` in turns. Memory is the peak of the process while it loads, less
what it held before (imports done), as a share of the file's size. The file is in the page cache.
Needs torch and transformers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import json, sys, threading, time
sys.path[:0] = {path!r}
{imports}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
done = True
watcher.join()
print(json.dumps([seconds, peak - before, sum_of]))
"""
OURS = (
    "import jax, clip_jax\njax.devices(), clip_jax.load",  # imported when it is first named
    "model, _ = clip_jax.load({folder!r})\n"
    "jax.block_until_ready(model.logit_scale[...])\n"
    "sum_of = float(model.text.token_embedding[...].sum())",
)
THEIRS = (
    "import types\n"
    "name = 'torchvision._meta_registrations'\n"
    "sys.modules.setdefault(name, types.ModuleType(name))\n"
    "from transformers import CLIPModel\n"
    "import torch, logging",
    "model = CLIPModel.from_pretrained({folder!r})\n"
    "with torch.no_grad():\n"
    "    table = model.text_model.embeddings.token_embedding.weight\n"
    "    sum_of = float(table.sum())\n"
    # A mapped file is not in memory before it is touched: touch all of it, as a first use would.
    "    total = sum(float(p.sum()) for p in model.parameters())",
)


def measure(program: tuple[str, str], folder: str) -> list[float]:
    imports, load = program
    code = MEASURE.format(path=sys.path[:1], imports=imports, load=load.format(folder=folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, name: str) -> int:
    """A folder of random weights; returns the size of its file."""
    import numpy as np
    from safetensors.numpy import save_file

    from clip_jax.models import model_config
    from clip_jax.weights import transformers
    from clip_jax.weights.source import entries

    config = model_config(name)
    values, kind = transformers.write_config(config)
    (folder / "config.json").write_text(json.dumps(values))
    random = np.random.default_rng(0)
    tensors = {
        entry.name: 0.02 * random.standard_normal(entry.shape, np.float32)
        for entry in entries(transformers.RULES[kind], config)
    }
    tensors = {key: np.asarray(tensor, np.float32) for key, tensor in tensors.items()}
    save_file(tensors, folder / transformers.WEIGHTS, metadata={"format": "pt"})
    return (folder / transformers.WEIGHTS).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-L/14")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        size = write(Path(directory), args.model)
        print(f"{args.model}, {size / 1e9:.2f} GB in float32; {args.repeats} repeats in turns.\n")
        results: dict[str, list[list[float]]] = {"clip_jax": [], "Transformers": []}
        for _ in range(args.repeats):
            results["clip_jax"].append(measure(OURS, directory))
            results["Transformers"].append(measure(THEIRS, directory))
    print("|  | seconds, median (least to most) | peak memory / file |\n|---|---|---|")
    for name, runs in results.items():
        seconds = sorted(run[0] for run in runs)
        memory = max(run[1] for run in runs) / size
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) "
            f"| {memory:.2f} |"
        )


if __name__ == "__main__":
    main()
