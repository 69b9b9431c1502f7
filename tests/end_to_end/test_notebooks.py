"""The notebooks are stored clean, and show the statistics of sdzero.report on a smoke run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from sdzero.report import RunFolder, evaluations, first_wrong, localization, phases
from support.runs import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
NUM_PLOTS = {"token_kl_localization": 3, "training_dynamics": 3, "revision_stats": 1}


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_notebooks_are_short_valid_and_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and len(notebook.cells) <= 20
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 12 for cell in code), "statistics belong in sdzero.report"


def tables(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Variables that each notebook must hold."""
    frame = run.token_kl("self_distill", "train")
    metrics = ("response_tokens", "keywords_per_response", "avg_at_k", "truncated")
    return {
        "token_kl_localization": {
            "concentration": localization.concentration(frame),
            "hits": first_wrong.hits(frame),
            "kinds": first_wrong.by_kind(frame),
        },
        "training_dynamics": {
            "table": evaluations.evaluations(run, metrics),
            "accuracy": phases.over_phases(run, "avg_at_k"),
        },
        "revision_stats": {
            "table_9": evaluations.table_9(run),
            "corrections": evaluations.corrections(run),
            "copying": evaluations.copying(run),
        },
    }


@pytest.fixture(scope="module")
def executed(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[NotebookNode]]]:
    """The cells of all notebooks, executed in one kernel, which forgets all names in between. The last cell of each
    prints its tables."""
    cells: dict[str, list[NotebookNode]] = {}
    for name, values in tables(RunFolder(smoke_run)).items():
        pairs = ", ".join(f"{key!r}: json.loads({key}.to_json())" for key in values)
        show = new_code_cell(f"import json\nprint(json.dumps({{{pairs}}}))")
        cells[name] = [new_code_cell("%reset -f"), *nbformat.read(NOTEBOOKS[name], as_version=4).cells, show]
    client = NotebookClient(
        new_notebook(cells=[*chain.from_iterable(cells.values())]), timeout=300, kernel_name="python3"
    )
    environment = {
        "SDZERO_RUN": str(smoke_run.resolve()),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    client.execute(cwd=str(ROOT / "notebooks"), env={**os.environ, **environment})
    yield cells


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_show_the_statistics(name: str, executed: dict[str, list[NotebookNode]], smoke_run: Path) -> None:
    *cells, last = executed[name]
    expected = tables(RunFolder(smoke_run))[name]
    assert all(len(table) for table in expected.values())
    assert json.loads(last.outputs[0].text) == {key: json.loads(str(t.to_json())) for key, t in expected.items()}
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = [output.get("data", {}) for output in outputs]
    assert sum("image/png" in data for data in shown) == NUM_PLOTS[name]
    assert sum("<iframe" in data.get("text/html", "") for data in shown) == 1


def test_the_default_run_is_found_from_either_folder_and_a_missing_one_is_named(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = nbformat.read(NOTEBOOKS["revision_stats"], as_version=4).cells[1].source
    plain = "\n".join(line for line in setup.splitlines() if not line.startswith("%"))
    monkeypatch.delenv("SDZERO_RUN", raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(smoke_run)
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        exec(plain, {})
    monkeypatch.setenv("SDZERO_RUN", "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere.*sdzero run"):
        exec(plain, {})
