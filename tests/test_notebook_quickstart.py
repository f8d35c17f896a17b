"""The quickstart notebook, executed from top to bottom in a kernel of its own."""

import json
import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
STEPS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The executed notebook and the folder it ran in."""
    folder = tmp_path_factory.mktemp("quickstart")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "QUICKSTART_STEPS": str(STEPS),
    }
    client.execute(env=env)
    return notebook, folder


def outputs(notebook, containing: str) -> list:
    """The outputs of the code cell whose source contains this."""
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and containing in c.source]
    return cell.outputs


def text_of(notebook, containing: str) -> str:
    return "".join(o.text for o in outputs(notebook, containing) if o.output_type == "stream")


def test_notebook_quickstart_learns(run):
    _, folder = run
    lines = (folder / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    train = [row for row in rows if row["split"] == "train"]
    (evaluation,) = [row for row in rows if row["split"] == "eval"]
    assert train[-1]["step"] == evaluation["step"] == STEPS
    assert train[-1]["loss"] < 0.75 * train[0]["loss"]
    assert evaluation["loss"] < 0.75 * train[0]["loss"]


def test_notebook_quickstart_refuses_a_misspelt_key(run):
    notebook, _ = run
    assert "num_stps" in text_of(notebook, "num_stps")
    assert "num_steps" in text_of(notebook, "num_stps")


def test_notebook_quickstart_plots(run):
    notebook, _ = run
    (figure,) = [o for o in outputs(notebook, "plt.show") if o.output_type == "display_data"]
    assert len(figure.data["image/png"]) > 5000


def test_notebook_quickstart_shows_shardings(run):
    notebook, _ = run
    told = text_of(notebook, "inspect shardings")
    assert "mesh: fsdp=4 x tensor=2" in told
    (row,) = [line for line in told.splitlines() if line.startswith("blocks/mlp/up/kernel")]
    assert "(-, fsdp, tensor)" in row


def test_notebook_quickstart_generates(run):
    notebook, _ = run
    told = text_of(notebook, "sample_text")
    first, second = told.split("--- after")[1:]
    assert first.startswith(f" {STEPS} steps: 'def '\ndef ")
    assert second.startswith(f" {STEPS} steps: 'import '\nimport ")
    assert len(told) > 200


def test_notebook_quickstart_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not c.outputs and c.execution_count is None for c in code)
