"""Origin of a run's models: statistics of the collections, and records of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdzero.report.run_folder import RunFolder

ATTEMPTS = {
    "initial": "first attempts",
    "revision_r0": "revisions of wrong attempts",
    "revision_r1": "revisions of right attempts",
}
FACTS = {
    "task": "task.class_path",
    "model": "student.path",
    "engine": "engine.class_path",
    "seed": "seed_everything",
    "accelerator": "trainer.accelerator",
}
"""Facts at the top of the page -> suffix of their config key."""


@dataclass(frozen=True)
class Collection:
    """Statistics of a collection: shares by verdict for each kind of attempt, and the traces."""

    stage: str
    reasons: list[str]
    attempts: list[tuple[str, int, float, list[str]]]
    traces: list[tuple[str, int, float]]


@dataclass(frozen=True)
class StageRecord:
    """Record of a stage; hashes by the name of what they belong to."""

    name: str
    seconds: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    versions: str


def collections(run: RunFolder) -> list[Collection]:
    """Return the statistics of the collections that have finished."""
    found = ((stage.name, run.statistics(stage.name)) for stage in run.lineage.collections)
    return [_collection(stage, statistics) for stage, statistics in found if statistics]


def _collection(stage: str, statistics: Mapping[str, Any]) -> Collection:
    kinds = {label: statistics[kind] for kind, label in ATTEMPTS.items() if kind in statistics}
    rates = {key.removeprefix("rate_") for kind in kinds.values() for key in kind if key.startswith("rate_")}
    reasons = sorted(rates, key=lambda reason: (reason != "correct", reason))
    attempts = [
        (label, kind["generations"], kind["mean_tokens"], [f"{kind.get(f'rate_{r}', 0):.1%}" for r in reasons])
        for label, kind in kinds.items()
    ]
    traces = [
        ("candidates: verified, finished revisions", "candidate_traces", "candidate_correct_share"),
        ("kept", "traces", "correct_share"),
    ]
    return Collection(
        stage, reasons, attempts, [(label, statistics[n], statistics[share]) for label, n, share in traces]
    )


def stage_records(run: RunFolder) -> list[StageRecord]:
    """Return the records of the stages in the order in which they ran."""
    return [
        StageRecord(
            name,
            f"{record['seconds']:,.0f}" if "seconds" in record else "not finished",
            record["config"],
            record["inputs"],
            record.get("outputs", {}),
            ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items()),
        )
        for name, record in run.lineage.stages.items()
    ]


def facts(run: RunFolder) -> dict[str, str]:
    """Return the run's facts from the first stage whose config has them."""
    found: dict[str, str] = {}
    for config in run.configs():
        for name, suffix in FACTS.items():
            values = [value for key, value in config.items() if key == suffix or key.endswith(f".{suffix}")]
            if values:
                found.setdefault(name, str(values[0]).rpartition(".")[2] if "class_path" in suffix else str(values[0]))
    versions = sorted({record.versions for record in stage_records(run) if record.versions})
    return {name: found[name] for name in FACTS if name in found} | {"versions": " / ".join(versions)}
