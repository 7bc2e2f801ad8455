"""walkthrough.ipynb runs from top to bottom, and the file holds its pictures."""
import json
import shutil

import pytest
from toys import ROOT

NOTEBOOK = ROOT / "walkthrough.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def test_the_stored_notebook_is_one_run_with_its_pictures():
    notebook = json.loads(NOTEBOOK.read_text())
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(notebook):
        assert output["output_type"] == "display_data" or output["name"] == "stdout", output
    assert len(pictures(notebook)) == 8 and NOTEBOOK.stat().st_size < 2**20


@pytest.mark.slow
def test_the_notebook_runs_in_a_copy_of_the_repository(tmp_path, monkeypatch):
    """Its cells have their own assertions: both equations of predict, both losses and two steps by hand."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    clone = tmp_path / "clone"
    leave = shutil.ignore_patterns(".*", "runs", "data", "tests", "experiments", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=leave)
    notebook = nbformat.read(clone / NOTEBOOK.name, as_version=4)
    stored = len(pictures(notebook))
    for cell in code_cells(notebook):
        cell["outputs"] = []
    where = {"metadata": {"path": str(clone)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    assert len(pictures(notebook)) == stored > 0
