"""Where the models come from: what collection kept, and what lineage.json says of every stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdzero.report.run_folder import RunFolder

OUTPUTS = {
    "base/eval": "results.json",
    "collect": "statistics.json",
    "srt": "model",
    "srt/eval": "results.json",
    "self_distill": "model",
    "self_distill/eval": "results.json",
}
"""What a stage leaves when it has finished. The base's own training is left out: not every recipe has it."""

ATTEMPTS = {
    "initial": "first attempts",
    "revision_r0": "revisions of wrong attempts",
    "revision_r1": "revisions of right attempts",
}


@dataclass(frozen=True)
class Collection:
    """Collection's statistics: rates by reason for each kind of attempt, and the traces."""

    reasons: list[str]
    attempts: list[tuple[str, int, float, list[str]]]
    traces: list[tuple[str, int, float]]


@dataclass(frozen=True)
class Stage:
    """A stage's record; hashes by what they are of."""

    name: str
    seconds: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    versions: str


PHASE_1 = ("collect", "srt", "srt/eval")


def missing(run: RunFolder) -> list[str]:
    """The stages that have not finished. A run of phase 2 alone, which began without phase 1, has none of that."""
    lineage = run.lineage()
    left_out = PHASE_1 if "self_distill" in lineage and not lineage.keys() & set(PHASE_1) else ()
    stages = [stage for stage in OUTPUTS if stage not in left_out]
    return [stage for stage in stages if not (run.path / stage / OUTPUTS[stage]).exists()]


def collection(statistics: Mapping[str, Any]) -> Collection | None:
    """None before collection has finished."""
    if not statistics:
        return None
    kinds = {name: statistics[kind] for kind, name in ATTEMPTS.items()}
    found = {key.removeprefix("rate_") for kind in kinds.values() for key in kind if key.startswith("rate_")}
    reasons = sorted(found, key=lambda reason: (reason != "correct", reason))
    attempts = [
        (name, kind["generations"], kind["mean_tokens"], [f"{kind.get(f'rate_{r}', 0):.1%}" for r in reasons])
        for name, kind in kinds.items()
    ]
    traces = [
        (
            "candidates: verified revisions that ended",
            statistics["candidate_traces"],
            statistics["candidate_correct_share"],
        ),
        ("kept as D_revision", statistics["traces"], statistics["correct_share"]),
    ]
    return Collection(reasons, attempts, traces)


def stages(lineage: Mapping[str, Any]) -> list[Stage]:
    """The stages in the order in which they ran."""
    return [
        Stage(
            name,
            f"{record['seconds']:,.0f}" if "seconds" in record else "not finished",
            record["config"],
            record["inputs"],
            record.get("outputs", {}),
            ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items()),
        )
        for name, record in lineage.items()
    ]


def shortened(value: str) -> str:
    """The first twelve signs of a SHA-256; a hub id as it is."""
    return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value


def facts(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first about a run, from the stages' configs: what is not there is left out."""
    wanted = {
        "task": "task.class_path",
        "model": "student.path",
        "engine": "engine.class_path",
        "seed": "seed_everything",
        "accelerator": "trainer.accelerator",
    }
    found: dict[str, str] = {}
    for record in lineage.values():
        for name, key in wanted.items():
            values = [v for k, v in record["config"].items() if k == key or k.endswith(f".{key}")]
            if values:
                found.setdefault(name, str(values[0]).rpartition(".")[2] if "class_path" in key else str(values[0]))
    versions: set[str] = {stage.versions for stage in stages(lineage) if stage.versions}
    return {name: found[name] for name in wanted if name in found} | {"versions": " / ".join(sorted(versions))}
