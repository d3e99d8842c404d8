"""The floors of the house: imports point downward only, and the way in is short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "models",
        "tokenizer",
        "tokenizers",
        "weights",
        "preprocess",
        "losses",
        "resize",
        "optim",
        "sharding",
        "rounding",
        "chips",
        "config",
        "errors",
        "version",
    },
    {"data", "checkpoint"},
    {"loading", "training"},
    {"eval", "search", "convert", "aot"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEWCOMERS_PATH = [
    "configs/quickstart.py",
    "train.py",
    "clip_jax/training/loop.py",
    "clip_jax/training/step.py",
    "clip_jax/models/clip.py",
]
MODULES = sorted((ROOT / "clip_jax").rglob("*.py"))


def room(path):
    return path.relative_to(ROOT / "clip_jax").with_suffix("").parts[0]


def imports(path):
    """Dotted names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    if room(path) == "__init__":  # the public face stands on loading, floor 2
        own = 2
    else:
        assert room(path) in FLOOR, f"{room(path)} has no floor"
        own = FLOOR[room(path)]
    for name in imports(path):
        if name.startswith("clip_jax."):
            other = name.split(".")[1]
            assert FLOOR.get(other, 0) <= own, f"floor {own} imports {name}"


def test_models_know_no_mesh_and_losses_no_model():
    for path in MODULES:
        names = " ".join(imports(path))
        if room(path) == "models":
            assert "sharding" not in names, path
        if room(path) == "losses":
            assert "clip_jax.models" not in names, path


def test_importing_the_package_loads_neither_tensorflow_nor_torch():
    heavy = ("tensorflow", "torch", "transformers", "huggingface_hub")
    command = f"import sys, clip_jax; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.strip() == "[]"


def test_only_the_rooms_that_read_data_or_write_logs_import_tensorflow():
    allowed = {"data", "training/metrics"}
    for path in MODULES:
        where = str(path.relative_to(ROOT / "clip_jax").with_suffix(""))
        if any(
            name.split(".")[0] in ("tensorflow", "tensorflow_datasets") for name in imports(path)
        ):
            assert where in allowed or room(path) in allowed, where


def test_the_newcomers_path_is_under_600_lines():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in NEWCOMERS_PATH}
    assert sum(lengths.values()) < 600, lengths


def test_no_file_is_called_by_a_name_that_says_nothing():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert not [
        path for path in ROOT.rglob("*.py") if path.stem in vague and ".venv" not in path.parts
    ]


def test_functions_and_files_stay_readable():
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                limit = 130 if (path.stem, node.name) == ("loop", "train") else 90
                assert length <= limit, f"{path}: {node.name} has {length} lines"
