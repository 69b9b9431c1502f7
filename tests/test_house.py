"""Layout, wheel, light imports, documents that name existing files, docstrings that follow the style rule."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import sdzero

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINKED = ("callbacks", "configs")
RELATIVE = re.compile(r"(What|Whether|Where|Which|How|Who|Whose)\b")
NOT_SOURCE = (".git", ".venv*", "runs", "build", "dist", "*.egg-info", "*_cache", "__pycache__")


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", LINKED)
def test_the_package_links_to_the_folder_at_the_top(name: str) -> None:
    link, folder = ROOT / "src/sdzero" / name, ROOT / name
    assert not folder.is_symlink()
    assert link.readlink() == Path("../..") / name
    assert link.resolve() == folder
    assert link.samefile(folder)


def test_the_console_script_and_the_version() -> None:
    (script,) = entry_points(group="console_scripts", name="sdzero")
    assert script.value == "sdzero.cli.main:main"
    assert version("sdzero") == sdzero.__version__


@pytest.mark.parametrize("module", ["sdzero", "sdzero.types", "sdzero.utils.seeds"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    run(sys.executable, "-c", f"import sys, {module}; sys.exit('torch' in sys.modules)", cwd=ROOT)


def built(source: Path, folder: Path) -> zipfile.ZipFile:
    """Build a wheel from `source` with pip, without a network."""
    wheel_command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, *wheel_command, "--wheel-dir", str(folder), str(source), cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def not_source(folder: str, names: list[str]) -> set[str]:
    """List the names in a folder of the tree that are not source: at the top, downloaded models too."""
    return shutil.ignore_patterns(*NOT_SOURCE, *["models"] * (Path(folder) == ROOT))(folder, names)


def test_wheels_from_the_tree_and_from_the_sdist_hold_every_file_and_work(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=not_source)
    files = {path.relative_to(tree / "src").as_posix() for path in (tree / "src/sdzero").rglob("*.*") if path.is_file()}
    linked = [path for name in LINKED for path in (tree / name).rglob("*.*") if path.is_file()]
    files |= {f"sdzero/{path.relative_to(tree)}" for path in linked}
    expected = ("callbacks/__init__.py", "report/templates/page.html", "configs/tiny_model/config.json")
    assert {f"sdzero/{name}" for name in expected} <= files
    (cache := tree / "configs/recipes/own_data/__pycache__").mkdir()  # left by an import of that recipe
    (cache / "verifier.cpython-311.pyc").touch()

    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    for source, folder in ((sdist, "from_sdist"), (tree, "from_tree")):
        wheel = built(source, tmp_path / folder)
        assert files <= set(wheel.namelist())
        assert not [name for name in wheel.namelist() if name.endswith(".pyc")]
    wheel.extractall(tmp_path / "site")
    (empty := tmp_path / "empty").mkdir()
    works_in(empty, tmp_path / "site")


def works_in(folder: Path, site: Path) -> None:
    """Copy a recipe out of the wheel, start it and write its report."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    commands = [
        "init smoke",
        "fit --config configs/recipes/smoke/base.yaml --trainer.max_steps 2",
        "report runs/smoke",
    ]
    for command in commands:
        run(sys.executable, "-m", "sdzero", *command.split(), cwd=folder, env=environment)
    assert (folder / "runs/smoke/base/model/model.safetensors").is_file()
    assert "</html>" in (folder / "runs/smoke/report.html").read_text()
    where = "import sdzero, pathlib; assert pathlib.Path(sdzero.__file__).is_relative_to(" + repr(str(site)) + ")"
    run(sys.executable, "-c", where, cwd=folder, env=environment)


def test_no_source_file_names_a_package_registry() -> None:
    hosts = [".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"))]
    for folder in ("src", "callbacks", "tests", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".toml", ".sh"):
                assert not any(host in path.read_text() for host in hosts), path


def is_inherited(file: Path) -> bool:
    """Commands may name a stage's file in a recipe that inherits it from the folder that it extends."""
    recipe = file.with_name("recipe.yaml")
    extends = re.search(r"^extends: (.*)$", recipe.read_text(), flags=re.M) if recipe.is_file() else None
    return extends is not None and (file.parent / extends[1] / file.name).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_exist(document: Path) -> None:
    text = document.read_text()
    linked = [name for name in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in name]
    assert [name for name in linked if not (document.parent / name).exists()] == []
    quoted = re.findall(r"\b(?:src|callbacks|configs|tests|docs|notebooks|benchmarks)/[\w./-]*\w", text)
    assert [name for name in quoted if not (ROOT / name).exists() and not is_inherited(ROOT / name)] == []


def test_docstrings_do_not_start_with_a_relative_clause() -> None:
    """Their first line is an imperative for a function, a noun phrase for a class or module."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    offenders = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {doc.splitlines()[0]}"
        for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented) and (doc := ast.get_docstring(node)) and RELATIVE.match(doc)
    ]
    assert offenders == []


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"```\n(configs/ .*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {*re.findall(r"^([\w/]+)/(?:  |$)", tree, flags=re.M)} == top - {
        "src",
        "runs",
        "models",
        "build",
        "dist",
    } | {"src/sdzero"}
    package = {p.name + "/" * p.is_dir() for p in (ROOT / "src/sdzero").iterdir() if not p.name.startswith("__")}
    assert {*re.findall(r"^  ([\w.]+/?)  ", tree, flags=re.M)} == package - {f"{name}/" for name in LINKED}
