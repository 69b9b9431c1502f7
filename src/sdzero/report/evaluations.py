"""Tables of the evaluations, one row per model (figure 3, table 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from sdzero.report.run_folder import RunFolder

KINDS = {"revise": "revised", "resample": "resampled"}
"""A revision from prompt + y + P_r, and for comparison a second answer from the prompt alone."""

FLIPS = ("wrong_to_right", "right_to_wrong")


def evaluations(run: RunFolder, metrics: Sequence[str]) -> pd.DataFrame:
    """Return one row per evaluated model (index: its label), a column per tag under eval/; NaN where not logged."""
    results = {model.label: run.results(model) for model in run.models}
    rows = {label: [of_model.get(f"eval/{m}") for m in metrics] for label, of_model in results.items() if of_model}
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(metrics), dtype=float)


def revision_metrics(run: RunFolder) -> pd.DataFrame:
    """Return the metrics of Generate-then-Revise, as `evaluations` does.

    `acc1` and `acc2`: accuracy of first and second attempts; `tokens1` and `tokens2`: their mean lengths;
    `correction_rate` = (acc2 - acc1) / (1 - acc1); `wrong_to_right_rate` of the wrong and `right_to_wrong_rate` of the
    right first attempts; `_se`: standard errors. Resampling's acc1 and acc2 average all samples and are equal by
    construction, so its correction rate is 0: only the last two rates distinguish revising from resampling.
    """
    names = ("acc1", "acc2", "correction_rate", *(f"{flip}_rate" for flip in FLIPS))
    with_error = [f"{kind}_{name}{suffix}" for kind in KINDS for name in names for suffix in ("", "_se")]
    return evaluations(run, ["revise_tokens1", "revise_tokens2", *with_error])


def copying(run: RunFolder) -> pd.DataFrame:
    """Return the share of answers with an unprompted control phrase, and the copied share of the next attempt."""
    return evaluations(run, ["phrase_leak", "copy_rate", *(f"revise_copy_rate{r}" for r in ("", "_r0", "_r1"))])


def table_9(run: RunFolder) -> pd.DataFrame:
    """Format table 9: mean tokens, accuracies and correction rate in %, with standard errors; "-" where not logged."""
    columns = {
        "first attempt: tokens": "revise_tokens1",
        "revised: tokens": "revise_tokens2",
        "first attempt: accuracy": "revise_acc1",
        "revised: accuracy": "revise_acc2",
        "correction rate": "revise_correction_rate",
    }
    return _format(revision_metrics(run), columns)


def corrections(run: RunFolder) -> pd.DataFrame:
    """Format the % of wrong first attempts corrected and of right ones broken, by revising and by resampling."""
    columns = {
        f"{flip.replace('_to_', '→')}: {word}": f"{kind}_{flip}_rate" for flip in FLIPS for kind, word in KINDS.items()
    }
    return _format(revision_metrics(run), columns)


def _format(metrics: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    rows = {
        label: [_percent(row[name], row.get(f"{name}_se")) for name in columns.values()]
        for label, row in metrics.to_dict(orient="index").items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(list(columns)))


def _percent(value: float, error: float | None) -> str:
    """Format a rate in % with its standard error, or a number of tokens, which has none."""
    if math.isnan(value):
        return "-"
    if error is None:
        return f"{value:.1f}"
    return f"{100 * value:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")
