"""`sdzero doctor`: what is here, what is missing, and what to do about it, as a table or as JSON.

It imports no torch into its own process: what needs none is on the screen at once, and a broken import or a driver
that hangs is a row of the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.util import find_spec

from sdzero.cli.doctor.imports import import_rows
from sdzero.cli.doctor.machine import machine_rows
from sdzero.cli.doctor.packages import package_rows
from sdzero.cli.doctor.probe import Probe
from sdzero.cli.doctor.rows import Row

STYLES = {"ok": "green", "warning": "yellow", "missing": "cyan", "broken": "red"}


def examine() -> Iterator[Row]:
    """All rows, those that need no torch first."""
    probe = Probe()
    yield from machine_rows()
    yield from package_rows()
    yield from import_rows(probe.findings())


def main(arguments: list[str]) -> None:
    """Exits with 1 where sdzero cannot work."""
    parser = argparse.ArgumentParser(prog="sdzero doctor", description="Looks at what sdzero needs and finds here.")
    parser.add_argument("--json", action="store_true", help="the same as JSON, to put into a report of a problem")
    if parser.parse_args(arguments).json:
        rows = list(examine())
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        rows = list(_printed(examine()))
    if fatal := [row.name for row in rows if row.is_fatal]:
        sys.exit(f"sdzero cannot work here: {', '.join(dict.fromkeys(fatal))}")


def _printed(rows: Iterable[Row]) -> list[Row]:
    """Shows rows as they come, and then what to do."""
    if find_spec("rich") is None:  # one of the things that may be missing
        shown = list(rows)
        print("\n".join(f"{row.name}: {row.status}: {row.found}" for row in shown))
    else:
        shown = _table(rows)
    remedies = [f"  {row.name}: {row.remedy}" for row in shown if row.remedy]
    print("\n".join(["\nwhat to do, where you need it:", *remedies] if remedies else []))
    return shown


def _table(rows: Iterable[Row]) -> list[Row]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    table, shown = Table(), []
    for heading in ("", "status", "found"):
        table.add_column(heading)
    console = Console(width=None if Console().is_terminal else 120)
    with Live(table, console=console):
        for row in rows:
            table.add_row(Text(row.name), Text(row.status, STYLES[row.status]), Text(row.found))
            shown.append(row)
    return shown
