"""`sdzero init NAME`: a shipped recipe in the current folder, to be run and edited there.

The recipes travel in the wheel: src/sdzero/configs is a link to /configs, and setuptools copies what it points to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "configs"
PARTS = ("tiny_model", "trainer", "tasks", "engines", "ablations", "scripts")
"""Folders of `configs` that recipes refer to, are overlaid with or are launched by."""


def recipes() -> dict[str, str]:
    """Name -> what it is for: the comment that its first stage's file begins with."""
    firsts = {folder.name: _first_stage(folder) for folder in sorted((SHIPPED / "recipes").iterdir())}
    return {name: file.read_text().splitlines()[0].removeprefix("# ") for name, file in firsts.items()}


def _first_stage(folder: Path) -> Path:
    base = folder / "base.yaml"
    return base if base.is_file() else folder / "collect.yaml"


def in_order(name: str) -> list[str]:
    """The recipe, after those whose models it starts from."""
    text = "".join(file.read_text() for file in sorted((SHIPPED / "recipes" / name).glob("*.yaml")))
    return [*(other for other in recipes() if other != name and f"runs/{other}/" in text), name]


def write(name: str, root: Path) -> list[Path]:
    """Copies a recipe, those it starts from, and the parts to `root`/configs; returns the files that were not there.

    Raises:
        ValueError: there is no such recipe, or a file is there with other content. Nothing is written then.
    """
    if name not in recipes():
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(recipes())}")
    folders = [*(SHIPPED / "recipes" / each for each in in_order(name)), *(SHIPPED / part for part in PARTS)]
    sources = [file for folder in folders for file in sorted(folder.rglob("*")) if _is_config(file)]
    targets = {root / "configs" / source.relative_to(SHIPPED): source for source in sources}
    edited = [t for t, source in targets.items() if t.exists() and t.read_bytes() != source.read_bytes()]
    if edited:
        raise ValueError(
            f"{edited[0]} is there with other content ({len(edited)} such files): move it away, or go to another folder"
        )
    missing = [target for target in targets if not target.exists()]
    for target in missing:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(targets[target].read_bytes())
    return missing


def _is_config(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sdzero init", description="Writes a recipe into ./configs, to be run and edited there."
    )
    parser.add_argument("name", nargs="?", help="which; without it, the recipes there are")
    name = parser.parse_args(arguments).name
    if name is None:
        width = max(map(len, recipes()))
        print("\n".join(f"{name:{width}}  {purpose}" for name, purpose in recipes().items()))
        print("\n`sdzero init NAME` writes one into ./configs")
        return
    written = write(name, Path())
    print("\n".join(map(str, written)) or "all of it is there already")
    print("\nnext:", *(f"  sdzero run configs/recipes/{each}" for each in in_order(name)), sep="\n")
