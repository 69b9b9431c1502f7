"""What one revision does to first attempts, model by model (figure 3, table 9)."""

from __future__ import annotations

import math

import pandas as pd

from sdzero.report.phases import evaluations
from sdzero.report.run_folder import MODELS, RunFolder

KINDS = ("revise", "resample")
"""A revision from prompt + y + P_r, and for comparison a second answer from the prompt alone."""

_WITH_ERROR = [f"{kind}_{name}" for kind in KINDS for name in ("acc1", "acc2", "correction_rate")]
_WITH_ERROR += [f"{kind}_{name}_rate" for kind in KINDS for name in ("wrong_to_right", "right_to_wrong")]
FIGURES = ["revise_tokens1", "revise_tokens2", *(name for figure in _WITH_ERROR for name in (figure, f"{figure}_se"))]
COPYING = ["phrase_leak", "copy_rate", "revise_copy_rate", "revise_copy_rate_r0", "revise_copy_rate_r1"]


def revision_figures(run: RunFolder) -> pd.DataFrame:
    """What `phases.evaluations` returns for the figures of Generate-then-Revise.

    `acc1` and `acc2`: accuracy of first attempts and of what follows them; `tokens1` and `tokens2`: their mean lengths;
    `correction_rate` = (acc2 - acc1) / (1 - acc1); `wrong_to_right_rate` of the wrong and `right_to_wrong_rate` of the
    right first attempts; `_se`: standard errors. Resampling's acc1 and acc2 are of all samples and equal by
    construction, so its correction rate is 0: what tells revising from resampling are the last two rates.
    """
    return evaluations(run, FIGURES)


def copying(run: RunFolder) -> pd.DataFrame:
    """Share of answers that say a control phrase unasked, and share of the next attempt's tokens that are copies."""
    return evaluations(run, COPYING).rename(index=MODELS)


def table_9(run: RunFolder) -> pd.DataFrame:
    """Table 9 to read: mean tokens, accuracies and correction rate in %, with standard errors; "-" where not logged."""
    columns = {
        "first attempt: tokens": "revise_tokens1",
        "revised: tokens": "revise_tokens2",
        "first attempt: accuracy": "revise_acc1",
        "revised: accuracy": "revise_acc2",
        "correction rate": "revise_correction_rate",
    }
    return _readable(revision_figures(run), columns)


def mended_and_broken(run: RunFolder) -> pd.DataFrame:
    """To read: % of the wrong first attempts mended and of the right ones broken, by revising and by resampling."""
    columns = {
        f"{flip.replace('_to_', '→')}: {word}": f"{kind}_{flip}_rate"
        for flip in ("wrong_to_right", "right_to_wrong")
        for kind, word in zip(KINDS, ("revised", "resampled"), strict=True)
    }
    return _readable(revision_figures(run), columns)


def _readable(figures: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    rows = {
        MODELS[str(model)]: [_text(row[name], row.get(f"{name}_se")) for name in columns.values()]
        for model, row in figures.to_dict(orient="index").items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(list(columns)))


def _text(value: float, error: float | None) -> str:
    """A rate in % with its standard error, or a number of tokens (which has none)."""
    if math.isnan(value):
        return "-"
    if error is None:
        return f"{value:.1f}"
    return f"{100 * value:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")
