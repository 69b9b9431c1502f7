"""`sdzero init NAME`: copy a shipped recipe into the current folder, to be run and edited there.

The recipes travel in the wheel: src/sdzero/configs is a link to /configs, and setuptools copies what it points to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdzero.pipeline.stages import RUNS
from sdzero.utils.recipe import RECIPE, load_recipe

SHIPPED = Path(__file__).parents[1] / "configs"
PARTS = ("paper", "tiny_model", "trainer", "tasks", "engines", "ablations", "scripts")
"""Folders of `configs` that recipes extend, refer to, are overlaid with or are launched by."""


def recipes() -> dict[str, str]:
    """Return the recipes' purposes by name: the first comments of their recipe.yaml."""
    files = sorted((SHIPPED / "recipes").glob(f"*/{RECIPE}"))
    return {file.parent.name: file.read_text().splitlines()[0].removeprefix("# ") for file in files}


def in_order(name: str) -> list[str]:
    """Return the recipe, after the one whose model it starts from."""
    path = Path(load_recipe(SHIPPED / "recipes" / name).student_path()).parts
    before = path[1] if path[0] == RUNS.name else name
    return [*([before] if before != name and before in recipes() else []), name]


def write(name: str, root: Path) -> list[Path]:
    """Copy a recipe, the one it starts from, and the parts to `root`/configs; returns the files that were missing.

    Raises:
        ValueError: there is no such recipe, or a file exists with other content. Nothing is written then.
    """
    if name not in recipes():
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(recipes())}")
    folders = [*(SHIPPED / "recipes" / each for each in in_order(name)), *(SHIPPED / part for part in PARTS)]
    found = [file for folder in folders for file in sorted(folder.rglob("*"))]
    sources = [file for file in found if file.is_file() and "__pycache__" not in file.parts]
    targets = {root / "configs" / source.relative_to(SHIPPED): source for source in sources}
    edited = [t for t, source in targets.items() if t.exists() and t.read_bytes() != source.read_bytes()]
    if edited:
        raise ValueError(
            f"{edited[0]} exists with other content ({len(edited)} such files): move it away, or go to another folder"
        )
    missing = [target for target in targets if not target.exists()]
    for target in missing:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(targets[target].read_bytes())
    return missing


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero init", description="Writes a recipe into ./configs, to be run and edited there."
    )
    parser.add_argument("name", nargs="?", help="name of a recipe; without it, the recipes are listed")
    name = parser.parse_args(arguments).name
    if name is None:
        width = max(map(len, recipes()))
        print("\n".join(f"{name:{width}}  {purpose}" for name, purpose in recipes().items()))
        print("\n`sdzero init NAME` writes one into ./configs")
        return
    written = write(name, Path())
    print("\n".join(map(str, written)) or "all files exist already")
    print("\nnext:", *(f"  sdzero run configs/recipes/{each}" for each in in_order(name)), sep="\n")
