"""The notebook of the documents, run from its first cell to its last."""

from pathlib import Path

import nbclient
import nbformat

from tests.helpers.documents import PROJECT

NOTEBOOK = PROJECT / "docs" / "notebook.ipynb"
SECONDS = 900


def test_the_notebook_runs_and_its_outputs_are_kept(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in kept] == list(range(1, len(kept) + 1))
    assert all(cell.outputs for cell in kept)
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    [error] = [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert error.traceback == ["ConfigError: command line: optim.lrr: unknown key; did you mean 'lr'?"]
    assert (tmp_path / "runs" / "demo-SmoothedReplay-seed0" / "step_001" / "COMMITTED.json").is_file()
