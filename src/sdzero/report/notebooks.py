"""Notebooks as Markdown pages: `python -m sdzero.report.notebooks RUN` from the repository's root.

Needs the extra `notebooks`.
"""

from __future__ import annotations

import argparse
import os
import re
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from sdzero.report.run_folder import RunFolder

AS_PICTURES = ["image/png", "text/html", "text/markdown", "text/plain"]  # code hosts drop the colours of HTML
NUM_COLORS = 128  # of a picture: a quarter of the bytes


def execute(notebook: Path, run: Path) -> NotebookNode:
    """A notebook, executed on the folder of a run. Its file stays as it is."""
    node = nbformat.read(notebook, as_version=4)
    variables = {"SDZERO_RUN": str(run.resolve()), "PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm wants widgets
    client = NotebookClient(node, timeout=300, kernel_name="python3")
    return client.execute(cwd=str(notebook.parent), env={**os.environ, **variables})


def write_page(node: NotebookNode, name: str, head: str, folder: Path) -> None:
    """Writes an executed notebook as `folder/name.md`, begun by the line `head`, with its pictures beside it."""
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": AS_PICTURES}}))
    text, resources = exporter.from_notebook_node(node, {"unique_key": name, "output_files_dir": "."})
    text = re.sub(r"<style scoped>.*?</style>\s*", "", text, flags=re.DOTALL)  # shown as text where it has no effect
    text = re.sub(r"\s*\n\s*!\[png\]\(\./", "\n\n![](", text)
    text = re.sub(r"\n\s*\n\s*\n", "\n\n", text)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}_*.png"):
        old.unlink()
    for file, content in resources["outputs"].items():
        picture = Image.open(BytesIO(content)).convert("RGB").quantize(NUM_COLORS, Image.Quantize.MAXCOVERAGE)
        picture.save(folder / file, optimize=True)
    (folder / f"{name}.md").write_text(f"{head}\n\n{text.strip()}\n")


def about(run: RunFolder) -> str:
    """What a page says of the run that it shows."""
    config = run.lineage().get("self_distill", {}).get("config", {})
    seed, device = config.get("seed_everything", "unknown"), config.get("trainer.accelerator", "unknown")
    engine = str(config.get("data.init_args.engine.class_path", "unknown")).rpartition(".")[2]
    return f"the run `{run.path.resolve().name}` (seed {seed}, device {device}, engine {engine})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    parser.add_argument("--out", type=Path, default=Path("docs/notebooks"))
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    for notebook in sorted(arguments.notebooks.glob("*.ipynb")):
        command = f"python -m sdzero.report.notebooks {arguments.run}"
        head = f"*Rendered from {about(run)} by `{command}`; do not edit. Source: `notebooks/{notebook.name}`.*"
        write_page(execute(notebook, run.path), notebook.stem, head, arguments.out)


if __name__ == "__main__":
    main()
