"""The notebooks are stored clean, run on a smoke run, and show what sdzero.report says; their pages show it too."""

from __future__ import annotations

import json
import re
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from sdzero.report import RunFolder, first_wrong, localization, phases, revision
from sdzero.report import notebooks as render
from support.runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUM_FIGURES = {"token_kl_localization": 5, "training_dynamics": 3, "revision_stats": 1}


@pytest.fixture(autouse=True)
def kernel_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("SDZERO_RUN", raising=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_valid_and_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and len(notebook.cells) <= 20
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 12 for cell in code)  # statistics belong into sdzero.report


def expected(name: str, run: RunFolder) -> dict[str, Any]:
    """What the notebook's variables must hold."""
    frame = run.token_kl("self_distill", "train")
    tables = {
        "token_kl_localization": lambda: {
            "concentration": localization.concentration(frame),
            "hits": first_wrong.hits(frame),
            "kinds": first_wrong.by_kind(frame),
        },
        "training_dynamics": lambda: {
            "evaluations": phases.evaluations(
                run, ["response_tokens", "keywords_per_response", "avg_at_k", "truncated"]
            ),
            "accuracy": phases.over_phases(run, "avg_at_k"),
        },
        "revision_stats": lambda: {
            "table_9": revision.table_9(run),
            "flips": revision.mended_and_broken(run),
            "copying": revision.copying(run),
        },
    }[name]()
    assert all(len(table) for table in tables.values())
    return {key: json.loads(str(table.to_json())) for key, table in tables.items()}


@pytest.mark.parametrize("name", NUM_FIGURES)
def test_notebooks_and_their_pages_show_what_the_analysis_says(name, smoke_run, tmp_path):
    values = expected(name, RunFolder(smoke_run))
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    pairs = ", ".join(f"{key!r}: json.loads({key}.to_json())" for key in values)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{pairs}}}))"))
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")

    executed = render.execute(tmp_path / f"{name}.ipynb", smoke_run)
    assert json.loads(executed.cells.pop().outputs[0].text) == values
    assert [
        output for cell in executed.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"
    ] == []

    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / f"{name}_99_0.png").write_bytes(b"of a longer notebook")
    render.write_page(executed, name, "*Rendered*", pages)
    page = (pages / f"{name}.md").read_text()
    shown = re.findall(r"!\[\]\((\S+)\)", page)
    assert page.startswith("*Rendered*\n\n# ") and "<style" not in page
    assert len(shown) == NUM_FIGURES[name] and set(shown) == {file.name for file in pages.glob("*.png")}
    for picture in shown:
        assert (pages / picture).stat().st_size < 60_000
        with Image.open(pages / picture) as image:
            assert image.width > 400 and len(image.getcolors() or ()) > 5


def test_a_run_is_found_from_either_folder_and_missed_clearly(smoke_run, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(smoke_run)
    setup = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    steps = [setup, "os.chdir('..')", setup, "os.environ['SDZERO_RUN'] = 'nowhere'", setup]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(step) for step in steps])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute(cwd=str(tmp_path / "notebooks"))
    assert [
        output.ename for cell in notebook.cells[:4] for output in cell.outputs if output.output_type == "error"
    ] == []
    (error,) = notebook.cells[4].outputs
    assert error.ename == "FileNotFoundError" and "nowhere" in error.evalue and "sdzero run" in error.evalue


def test_a_page_says_of_which_run_it_is(smoke_run):
    assert render.about(RunFolder(smoke_run)) == "the run `smoke` (seed 0, device cpu, engine TransformersEngine)"
