"""The house stands: one callbacks folder, a complete wheel, light imports, documents that name what exists."""

from __future__ import annotations

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
NOT_SOURCE = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "*_cache", "__pycache__")


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_callbacks_folders_are_one() -> None:
    link, folder = ROOT / "src/sdzero/callbacks", ROOT / "callbacks"
    assert not folder.is_symlink()
    assert link.readlink() == Path("../../callbacks")
    assert link.resolve() == folder
    assert link.samefile(folder)


def test_the_console_script_and_the_version_are_those_of_the_package() -> None:
    (script,) = entry_points(group="console_scripts", name="sdzero")
    assert script.value == "sdzero.cli:main"
    assert version("sdzero") == sdzero.__version__


@pytest.mark.parametrize("module", ["sdzero", "sdzero.types", "sdzero.seeds"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    run(sys.executable, "-c", f"import sys, {module}; sys.exit('torch' in sys.modules)", cwd=ROOT)


def built_files(source: Path, folder: Path) -> set[str]:
    """The names in the wheel that pip builds from `source`, without a network."""
    wheel_command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, *wheel_command, "--wheel-dir", str(folder), str(source), cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheels_from_the_tree_and_from_the_sdist_hold_every_file(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    files = {path.relative_to(tree / "src").as_posix() for path in (tree / "src/sdzero").rglob("*.*")}
    files |= {f"sdzero/callbacks/{path.name}" for path in (tree / "callbacks").glob("*.py")}
    assert {"sdzero/callbacks/__init__.py", "sdzero/report/page.html"} <= files

    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    assert files <= built_files(sdist, tmp_path / "from_sdist")
    assert files <= built_files(tree, tmp_path / "from_tree")


def test_no_source_file_names_a_package_registry() -> None:
    hosts = [".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"))]
    for folder in ("src", "callbacks", "tests", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".toml", ".sh"):
                assert not any(host in path.read_text() for host in hosts), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_exist(document: Path) -> None:
    text = document.read_text()
    linked = [name for name in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in name]
    assert [name for name in linked if not (document.parent / name).exists()] == []
    quoted = re.findall(r"\b(?:src|callbacks|configs|tests|docs|notebooks|benchmarks)/[\w./-]*\w", text)
    assert [name for name in quoted if not (ROOT / name).exists()] == []
