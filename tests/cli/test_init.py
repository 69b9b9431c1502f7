"""`sdzero init`: a recipe is written where the user stands, and nothing of theirs is written over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdzero.cli.init import main, recipes, write
from support.runs import ROOT

CONFIGS = ROOT / "configs"


def files(folder: Path) -> dict[str, bytes]:
    found = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


@pytest.mark.parametrize("name", sorted(folder.name for folder in (CONFIGS / "recipes").iterdir()))
def test_a_recipe_and_its_parts_are_written_as_they_are_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([name])
    said = capsys.readouterr().out
    names = ["smoke", name] if name == "own_data" else [name]  # it starts from the smoke recipe's model
    assert said.endswith("\nnext:\n" + "".join(f"  sdzero run configs/recipes/{each}\n" for each in names))
    assert f"configs/recipes/{name}/recipe.yaml" in said
    recipes = tuple(f"recipes/{each}/" for each in names)
    parts = {
        k: v for k, v in files(CONFIGS).items() if not k.startswith(("recipes/", "examples/")) or k.startswith(recipes)
    }
    assert files(tmp_path / "configs") == parts and "tiny_model/tokenizer.json" in parts
    assert write(name, tmp_path) == []


def test_what_was_edited_is_not_written_over(tmp_path: Path) -> None:
    write("smoke", tmp_path)
    edited = tmp_path / "configs/recipes/smoke/srt.yaml"
    edited.write_text("mine: true\n")
    (tmp_path / "configs/recipes/smoke/eval.yaml").unlink()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"srt\.yaml exists with other content \(1 such files\)"):
        write("smoke", tmp_path)
    assert files(tmp_path) == before, "nothing is written where something stands in the way"


def test_without_a_name_it_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    assert all(f"{name} " in said and purpose in said for name, purpose in recipes().items())
    assert all(len(purpose) > 30 for purpose in recipes().values())
    with pytest.raises(ValueError, match=r"no recipe 'nothing'; there are olmo3-7b-code, .*own_data, quickstart"):
        write("nothing", Path())


def test_a_users_module_is_found_by_the_console_script(tmp_path: Path) -> None:
    """python -m sdzero has the current folder on its path, the installed script has not."""
    (tmp_path / "my_tasks.py").write_text("from sdzero.tasks import Chains\n\n\nclass Mine(Chains):\n    pass\n")
    script = shutil.which("sdzero", path=str(Path(sys.executable).parent))
    assert script is not None
    options = ["--print_config", "--task", "my_tasks.Mine"]
    config = ["--config", str(CONFIGS / "recipes/smoke/collect.yaml")]
    command = [script, "collect", *config, *options]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "my_tasks.Mine" in done.stdout, done.stderr
