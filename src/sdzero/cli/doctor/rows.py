"""A row of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "missing", "broken"]


@dataclass(frozen=True)
class Row:
    """One finding and its remedy. Where a `required` one is missing or broken, sdzero cannot work."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    required: bool = False

    @property
    def is_fatal(self) -> bool:
        return self.required and self.status in ("missing", "broken")
