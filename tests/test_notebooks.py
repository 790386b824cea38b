"""The notebooks are kept without outputs, and run top to bottom, with nothing but the package."""

import json
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EACH_TIME = "merging"  # the quickest: the others learn, and ask transformers in a child process


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def names(path):
    return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_is_plain_and_holds_no_outputs(path):
    data = json.loads(path.read_text("utf-8"))
    assert (data["nbformat"], data["nbformat_minor"]) == (4, 4)  # cells need no ids
    assert data["metadata"]["kernelspec"]["name"] == "python3"
    assert data["cells"][0]["cell_type"] == "markdown"
    for cell in data["cells"]:
        assert set(cell) == {"cell_type", "metadata", "source"} or (
            cell["cell_type"] == "code" and cell["outputs"] == [] and not cell["execution_count"]
        )
        assert cell["metadata"] == {} and cell["source"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem == EACH_TIME else pytest.mark.matrix)
        for path in NOTEBOOKS
    ],
    ids=names,
)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    """Its cells in their order, in an empty folder, as a kernel would."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    said = []
    for place, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}[{place}]", "exec"), space)
            said.append(capsys.readouterr().out)
    assert "".join(said).strip()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.stem]  # writes there alone


@pytest.mark.matrix
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_runs_in_a_kernel(path, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    import nbformat

    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any(output["output_type"] == "stream" for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
