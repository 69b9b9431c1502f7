"""`sdzero doctor`: installed parts, missing parts and remedies, as a table or as JSON.

Does not import torch into its own process: rows that need no torch appear at once, and a broken import or a hanging
driver becomes a row of the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from sdzero.cli.doctor.machine import Row, machine_rows
from sdzero.cli.doctor.packages import import_rows, package_rows
from sdzero.cli.doctor.probe import Probe


def examine() -> Iterator[Row]:
    """Yield all rows, those that need no torch first."""
    probe = Probe()
    yield from machine_rows()
    yield from package_rows()
    yield from import_rows(probe.findings())


def main(arguments: list[str]) -> None:
    """Run the checks; exit with status 1 if sdzero cannot work here."""
    parser = argparse.ArgumentParser(prog="sdzero doctor", description="Checks this machine and its installation.")
    parser.add_argument("--json", action="store_true", help="print JSON, to attach to a problem report")
    as_json = parser.parse_args(arguments).json
    rows = []
    for row in examine():
        rows.append(row)
        if not as_json:
            print(f"{row.name:16} {row.status:8} {row.found}", flush=True)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    elif remedies := [f"  {row.name}: {row.remedy}" for row in rows if row.remedy]:
        print("\nremedies, where you need the part:", *remedies, sep="\n")
    if fatal := [row.name for row in rows if row.is_fatal]:
        sys.exit(f"sdzero cannot work here: {', '.join(dict.fromkeys(fatal))}")
