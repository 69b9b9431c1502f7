"""docs/troubleshooting.md quotes messages that the source still has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import huggingface_hub.constants
import pytest

from sdzero.cli.main import find_own_error
from support.runs import SMOKE, refusal

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
MESSAGES = [text.strip() for _, text in re.findall(r"^- Message: (`+)(.*)\1$", PAGE, flags=re.M)]


def texts() -> set[str]:
    """Every string of the source, with … in the place of what is filled in."""
    found = set()
    for file in [*(ROOT / "src/sdzero").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[sd]", "…", node.value))  # a log's message
    return found


def test_messages_are_those_of_the_source() -> None:
    source = texts()
    assert len(MESSAGES) > 30
    assert [message for message in MESSAGES if not any(message in text for text in source)] == []
    assert not [message for message in MESSAGES if len(message.replace("…", "")) < 15], "too short to tell apart"


def test_the_list_at_the_top_leads_to_the_headings() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, flags=re.M)
    assert re.findall(r"^- \[(.*?)\]", PAGE, flags=re.M) == headings
    anchors = [re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert re.findall(r"^- .*\(#(.*)\)$", PAGE, flags=re.M) == anchors


@pytest.mark.parametrize("stage", ["collect", "srt"])
def test_a_hub_that_is_out_of_reach(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    key, out = ("student.path", "out") if stage == "collect" else ("model.student.path", "trainer.default_root_dir")
    arguments = ("--config", SMOKE / f"{stage}.yaml", f"--{key}=nobody/nothing", f"--{out}={tmp_path}")
    said = refusal(capsys, monkeypatch, "collect" if stage == "collect" else "fit", *arguments)
    assert "student.path: 'nobody/nothing' cannot be read: " in said


def test_a_cause_that_was_never_raised_is_passed_over() -> None:
    with pytest.raises(ValueError, match="last") as caught:
        raise ValueError("last") from KeyError("never raised")
    assert find_own_error(caught.value) is None
