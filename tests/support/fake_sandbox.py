"""Fake sandbox client that runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.types import CodeVerdict, Submission


class FakeSandbox:
    """Returns the last line of a program as its verdict; `asked` records each call."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.asked: list[list[Submission]] = []

    def grade(self, submissions: Sequence[Submission]) -> list[CodeVerdict]:
        self.asked.append([*submissions])
        words: list[Any] = [submission.source.strip().rpartition("\n")[2] for submission in submissions]
        if "fault" in words:
            raise GraderError("the sandbox broke")
        return [CodeVerdict(int(word == "correct"), word, "fake") for word in words]  # pyright: ignore[reportArgumentType]


@pytest.fixture
def fake_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every program task a fake sandbox."""
    monkeypatch.setattr("sdzero.tasks.code.SandboxClient", FakeSandbox)
