"""Writes the table of docs/pods.md: which recipe fits which pod, and at what price.

    python benchmarks/pods.py                      # every row that docs/pods.json has not; hours
    python benchmarks/pods.py --rows 0 3 --again   # these anew
    python benchmarks/pods.py --rows               # compiles nothing, writes the table

Each row is one call of `python -m clip_jax.aot`, in a process of its own, a minute or more; a row
that is done is kept in docs/pods.json, whose entries are what `--json` writes. Needs libtpu.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "pods.json"
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- written by benchmarks/pods.py -->", "<!-- end -->"


class Row(NamedTuple):
    recipe: str
    topology: str
    target: float  # matrix products of the compiled step, in the model's own operations
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return " ".join((self.recipe, self.topology, *self.overrides))


ROWS = (
    Row("vitb32", "v5e:16x16", 1.05),
    Row("vitb16", "v5e:16x16", 1.05),
    Row("vitb32", "v4:8x8x4", 1.05),
    Row("vitb16", "v4:8x8x4", 1.05),
    Row("vitl14", "v5e:16x16", 1.15),
    Row("vitl14", "v5p:8x8x8", 1.05, ("train.remat=dots", "mesh.fsdp=1")),
    Row("vitl14", "v6e:16x16", 1.05, ("train.remat=dots", "mesh.fsdp=1")),
    Row("vitl14_336", "v5e:16x16", 1.30),
    Row("vitb16", "v5e:4x4", 1.45, ("train.accumulate=8",)),
    Row("rn50x16", "v5e:16x16", 1.30),
    Row("rn50x64", "v5p:8x8x8", 1.30),
)


def compile_row(row: Row, timeout: float) -> dict[str, Any] | None:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable,
            "-m",
            "clip_jax.aot",
            f"--config=configs/{row.recipe}.py",
            f"--topology={row.topology}",
            f"--json={file.name}",
            "--config.data.resize=host",  # docs/data.md has what the device's costs
            *(f"--config.{override}" for override in row.overrides),
        ]
        print(" ".join(command[1:]), flush=True)
        try:
            subprocess.run(command, cwd=ROOT, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"not done within {timeout:.0f} s")
            return None
        text = Path(file.name).read_text()
        return json.loads(text) if text else None


def table(results: dict[str, Any]) -> str:
    lines = [
        "| Model | Topology | Remat, microbatches | Peak GB (of) | Products / model | to reach | "
        "At least ms a step: units, HBM, links | MFU at most | Compiled in s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = results.get(row.key)
        if found is None:
            lines.append(f"| {row.recipe} | {row.topology} | not compiled | | | | | | |")
            continue
        cells = [
            found["model"],
            found["topology"],
            f"{found['remat']}, {found['accumulate']}",
            f"{found['peak_bytes_per_chip'] / 1e9:.2f} ({found['limit_bytes_per_chip'] / 1e9:.2f})",
        ]
        if found["fits"]:
            bound = found["bound_seconds"]
            met = found["recompute_ratio"] <= row.target
            cells += [
                f"{found['recompute_ratio']:.3f}" if met else f"**{found['recompute_ratio']:.3f}**",
                f"{row.target:.2f}" if met else f"{row.target:.2f}, missed",
                ", ".join(
                    f"{1e3 * bound[part]:.1f}"
                    for part in ("matrix_units", "memory", "interconnect")
                ),
                f"{found['mfu_bound']:.1%}",
            ]
        else:
            cells += ["**does not fit**", f"{row.target:.2f}, missed", "", ""]
        cells.append(f"{found['compile_seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)))
    parser.add_argument("--again", action="store_true", help="also what docs/pods.json has")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one row")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for number in args.rows:
        row = ROWS[number]
        if args.again or row.key not in results:
            found = compile_row(row, args.timeout)
            if found is not None:
                results[row.key] = found
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
