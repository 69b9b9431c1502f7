"""Random SIGKILLs: runs that are killed again and again must end, to the bit, as the one that nobody touched.

    make chaos                              20 kills at least, and some in each kind of place
    python tests/end_to_end/chaos.py --kills 5 --seed 1 --out runs/chaos

Each kill hits the run with its stage, the stage alone or the run's own process: at a random moment of a stage, inside a
save (right after a random fsync, or after a file was put in place), or inside the run's own bookkeeping. A shorter cut,
of chosen kills, is tests/end_to_end/test_resume.py.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.kills import Started, Victim, started
from support.runs import SMOKE, read_json, records, sdzero, write_records

PUT_IN_PLACE = (".ckpt", ".ckpt.sha256.json", "traces.jsonl", "questions-fit.json", "statistics.json", "model")
AT_LEAST = {"collect": 3, "srt": 3, "self_distill": 3, "in a save": 4, "in run": 2}
"""Kills of each kind that `make chaos` waits for, beyond their number in all."""


@dataclass(frozen=True)
class Kill:
    """stage: at work then; place: `in a save`, `in run` or `at work`; where: the same more closely."""

    stage: str
    place: str
    where: str
    victim: Victim

    def __str__(self) -> str:
        return f"{self.stage:18} {self.place:10} {self.where:32} {self.victim}"


def strike(out: Path, seconds: dict[str, float], rng: random.Random) -> Kill | None:
    """Starts or goes on with the run in `out` and kills it somewhere. None: it reached its end first."""
    victim: Victim = rng.choice(("group", "stage", "run"))
    place = rng.choice(("at work", "at work", "in a save", "in a save", "in run"))
    if place == "at work":
        return _strike_at_work(out, seconds, rng, victim)
    if place == "in run":
        stop, victim = f"replace={rng.choice(('lineage.json',) * 5 + ('summary.json',))}", "group"
    elif rng.random() < 0.6:
        stop = f"fsync={rng.randint(1, 12)}"
    else:
        stop = f"replace={rng.choice(PUT_IN_PLACE)}"
    with started(out, stop) as run:
        pid = run.wait_for_stop()
        if pid is None:
            return _ended(run)
        stage = _stage(run)
        run.kill(victim, None if pid == run.process.pid else pid)
        return Kill(stage, place, stop, victim)


def _strike_at_work(out: Path, seconds: dict[str, float], rng: random.Random, victim: Victim) -> Kill | None:
    with started(out) as run:
        while not (stage := _stage(run)):
            if run.process.poll() is not None:
                return _ended(run)
            time.sleep(0.05)
        delay = rng.uniform(0.1, 1.0) * seconds[stage]
        time.sleep(delay)
        if run.process.poll() is not None:
            return _ended(run)
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
        stage, pid = _stage(run), int(children[0]) if children else None  # it may be between two stages
        run.kill(victim, pid)
        return Kill(stage, "at work", f"{delay:.1f} s after its start", "group" if pid is None else victim)


def _stage(run: Started) -> str:
    """The stage that the run has started last; "" before the first."""
    titles = re.findall(r"^\[\d+/\d+\] (\S+): (?!finished before)", run.log.read_text(), re.MULTILINE)
    return titles[-1] if titles else ""


def _ended(run: Started) -> None:
    assert run.process.returncode == 0, run.log.read_text()


def harass(whole: Path, out: Path, rng: random.Random, num_kills: int) -> Iterator[Kill]:
    """Kills a run in `out` until it ends, `num_kills` times at most; then lets it end, and compares it with `whole`.

    It has the first stages of `whole` from the start, as many as chance will: the later ones get their share of kills.
    """
    lineage = records(whole)
    first = rng.choice(("collect", "srt", "self_distill"))
    given = dict(takewhile(lambda item: item[0] != first, lineage.items()))
    for name in given:
        shutil.copytree(whole / name, out / name, dirs_exist_ok=True)
    shutil.copy(whole / "lineage.json", out)
    write_records(out, given)
    seconds = {name: record["seconds"] for name, record in lineage.items()}
    for _ in range(num_kills):
        kill = strike(out, seconds, rng)
        if kill is None:
            break
        yield kill
    done = sdzero("run", SMOKE, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    compare(whole, out)


def compare(whole: Path, out: Path) -> None:
    """Weights, traces, metrics, rewards and questions are the same, to the bit."""
    ours, theirs = ([{**row, "seconds": 0} for row in read_json(run / "summary.json")] for run in (out, whole))
    assert ours == theirs  # each model's weights by their hash
    names = ("traces.jsonl", "questions*.json", "results.json", "rewards.json")
    files = sorted(file.relative_to(whole) for name in names for file in whole.rglob(name))
    assert len(files) > 10
    for file in files:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills runs at random and compares their ends, to the bit.")
    parser.add_argument("--kills", type=int, default=20, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of the runs; removed first")
    options = parser.parse_args()
    out, rng = options.out.resolve(), random.Random(options.seed)
    shutil.rmtree(out, ignore_errors=True)
    whole, started_at = out / "whole", time.monotonic()
    done = sdzero("run", SMOKE, "--out", whole)
    assert done.returncode == 0, done.stdout + done.stderr
    kills: list[Kill] = []
    num_runs = 0
    while len(kills) < options.kills or _missing(kills):
        num_runs += 1
        for kill in harass(whole, out / f"killed-{num_runs}", rng, max(options.kills - len(kills), 4)):
            kills.append(kill)
            print(f"{len(kills):3} {time.monotonic() - started_at:5.0f} s  run {num_runs}  {kill}", flush=True)
        print(f"run {num_runs} ended as the one that was never killed, to the bit", flush=True)
    print(f"{len(kills)} kills, {num_runs} runs, {time.monotonic() - started_at:.0f} s: {dict(_count(kills))}")


def _count(kills: list[Kill]) -> Counter[str]:
    return Counter(kind for kill in kills for kind in (kill.stage.removesuffix("/eval"), kill.place))


def _missing(kills: list[Kill]) -> list[str]:
    found = _count(kills)
    return [kind for kind, num in AT_LEAST.items() if found[kind] < num]


if __name__ == "__main__":
    main()
