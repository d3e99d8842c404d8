"""The notebooks, executed from the first cell to the last, and fit to be committed."""

import ast
import base64
import io
import json
import math
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
QUICKSTART = next(path for path in NOTEBOOKS if path.name == "quickstart.ipynb")
# Small enough for a minute on two cores, most of which goes into compiling, and still learning.
STEPS, PICTURES = 90, 3
QUICK = {
    "data.crop": (1.0, 1.0),
    "data.shuffle_bytes": 1 << 22,
    "log.every": 10,
    "model.embed_dim": 64,
    "model.text.layers": 1,
    "model.text.width": 64,
    "model.vision.layers": 2,
    "model.vision.width": 64,
    "optim.peak_lr": 3e-3,
    "optim.warmup_steps": 15,
    "optim.weight_decay": 0.0,
    "train.batch_size": 64,
    "train.unroll": 1,
}


def _python(cell):
    """The code of a cell, with magics and shell commands as the calls IPython makes of them."""
    return TransformerManager().transform_cell(cell.source)


def _set_parameters(notebook, **values):
    """Adds assignments to the cell tagged `parameters`; only of what it assigns itself."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    body = ast.parse(cell.source).body
    known = {target.id for statement in body for target in statement.targets}
    assert values.keys() <= known
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())


def _execute(notebook, directory, timeout):
    """Runs all cells in this interpreter, whatever kernels are installed; on one CPU device."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {
        "PYTHONPATH": str(QUICKSTART.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(directory / "ipython"),
    }
    # Without directories to search, "python3" is the kernel that ipykernel defines: sys.executable.
    kernel = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        connection_file=str(directory / "kernel.json"),
    )
    client = NotebookClient(notebook, km=kernel, timeout=timeout, startup_timeout=timeout)
    client.execute(cwd=str(QUICKSTART.parent), env=environment, cleanup_kc=True)


def _log(workdir):
    """The lines of the training's log."""
    return [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]


def _pictures(cell):
    """The PNGs that a cell shows, as arrays."""
    data = [output.data for output in cell.outputs if "data" in output]
    encoded = [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in encoded]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The quickstart after its execution: cells by id, some of its variables, the workdir."""
    directory = tmp_path_factory.mktemp("quickstart")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    _set_parameters(
        notebook,
        WORKDIR=str(directory / "run"),
        DATA_DIR=str(directory / "data"),
        STEPS=STEPS,
        PICTURES=PICTURES,
        CHANGES=QUICK,
    )
    variables = (
        "{'metrics': found.metrics, 'chance': chance, 'matrices': np.array(matrices).tolist(),"
        " 'loaded': model.config.to_dict()}"
    )
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({variables}))", id="variables")
    )
    _execute(notebook, directory, timeout=600)
    cells = {cell.id: cell for cell in notebook.cells}
    return cells, json.loads(cells["variables"].outputs[0].text), str(directory / "run")


@pytest.mark.slow
@pytest.mark.xdist_group("quickstart_notebook")
class TestQuickstart:
    def test_every_cell_runs(self, executed):
        cells, _, _ = executed
        ran = [cell.execution_count for cell in cells.values() if cell.cell_type == "code"]
        assert ran == list(range(1, len(ran) + 1))

    @pytest.mark.parametrize(
        "cell", ["look", "untrained", "training", "matrices", "curves", "prompts"]
    )
    def test_shows_a_picture(self, executed, cell):
        cells, _, _ = executed
        (picture,) = _pictures(cells[cell])
        height, width, _ = picture.shape
        assert min(height, width) > 100
        assert picture.std() > 10, "it is blank"

    def test_draws_the_matrix_of_a_dozen_pairs_at_every_look(self, executed):
        _, variables, workdir = executed
        logged = [line["step"] for line in _log(workdir) if "pairs/right" in line]
        assert logged == [30, 60, 90]
        assert np.shape(variables["matrices"]) == (1 + PICTURES, 12, 12)

    def test_the_diagonal_sharpens(self, executed):
        _, variables, _ = executed
        diagonal = np.eye(12, dtype=bool)
        first, *_, last = (
            matrix[diagonal].mean() - matrix[~diagonal].mean()
            for matrix in np.array(variables["matrices"])
        )
        assert abs(first) < 0.05
        assert last > first + 0.1

    def test_the_loss_falls(self, executed):
        _, _, workdir = executed
        losses = [line["loss"] for line in _log(workdir) if "loss" in line]
        assert len(losses) == STEPS // QUICK["log.every"]
        assert np.mean(losses[-3:]) < 0.9 * math.log(QUICK["train.batch_size"])

    def test_classifies_held_out_characters_better_than_chance(self, executed):
        _, variables, _ = executed
        assert variables["metrics"]["acc5"] > 3 * 5 * variables["chance"]

    def test_saves_and_loads_the_model_that_it_trained(self, executed):
        _, variables, workdir = executed
        assert Path(workdir, "checkpoints", str(STEPS)).is_dir()
        assert variables["loaded"]["embed_dim"] == QUICK["model.embed_dim"]
        assert variables["loaded"]["vision"]["width"] == QUICK["model.vision.width"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
class TestCommitted:
    def test_is_valid_and_runs_on_any_python_3(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"

    def test_has_no_outputs(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert cell.outputs == []
                assert cell.execution_count is None

    def test_compiles(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                compile(_python(cell), f"{path.name}, cell {cell.id}", "exec")
