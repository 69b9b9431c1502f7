"""Position of the largest KL relative to the first wrong step, for `sdzero.tasks.Chains`, whose steps are known.

Only the first attempt of a response counts, up to its first blank line. Its correct form is the text of
`chains.working`, so its first wrong token is the first that deviates from that text: usually the result of a step,
rarely a miscopied operand or a stop too early or too late.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd

from sdzero.evaluation.statistics import mean_and_error
from sdzero.tasks.chains import apply, solve, working

QUESTION = re.compile(r"(\d)((?:[-+*]\d)+)=")
WRITTEN_STEP = re.compile(r"(?=(\d)([-+*])(\d)=(\d))")  # lookahead: the result of a step begins the next step
Row = dict[Hashable, Any]
KINDS = ("wrong result", "right result", "rest of the attempt", "its end", "later attempts")


@dataclass(frozen=True)
class FirstAttempt:
    """Token indices of a response's first attempt.

    Attributes:
        num_tokens: its length.
        first_wrong: first token that deviates from the correct text; None if the attempt is right, or cut before.
        results: results of its steps.
        wrong_results: results that do not follow from the step as it is written.
    """

    num_tokens: int
    first_wrong: int | None
    results: tuple[int, ...]
    wrong_results: tuple[int, ...]

    def kind(self, token: int) -> str:
        """Return the kind of a token of the response, one of `KINDS`. At "its end" the model stops or continues."""
        if token >= self.num_tokens:
            return "its end" if token == self.num_tokens else "later attempts"
        if token in self.wrong_results:
            return "wrong result"
        return "right result" if token in self.results else "rest of the attempt"


def first_attempt(question: str, text: str, response: str, tokens: Sequence[str]) -> FirstAttempt | None:
    """Locate the first attempt at a question of `Chains`; None for any other task.

    Args:
        question: its id.
        text: its text, `6+3*9-4=`.
        response: the response's text.
        tokens: texts of its tokens, including special ones.
    """
    match = QUESTION.fullmatch(text)
    attempt, written = response.partition("\n\n")[0], "".join(tokens)
    if not question.startswith("chains/") or match is None or not written.startswith(attempt):
        return None
    first, steps = int(match[1]), [(step[0], int(step[1])) for step in re.findall(r"[-+*]\d", match[2])]
    token_of = np.repeat(np.arange(len(tokens)), list(map(len, tokens)))  # index of the token that holds a character
    gold = working(first, steps, solve(first, steps))
    leaves = next((i for i, (a, b) in enumerate(zip_longest(attempt, gold)) if a != b), len(gold))
    is_wrong = attempt != gold and leaves < len(written)
    found = list(WRITTEN_STEP.finditer(attempt))
    wrong = [step for step in found if apply(int(step[1]), step[2], int(step[3])) != int(step[4])]
    return FirstAttempt(
        num_tokens=int(token_of[len(attempt) - 1]) + 1 if attempt else 0,
        first_wrong=int(token_of[leaves]) if is_wrong else None,
        results=tuple(int(token_of[step.start(4)]) for step in found),
        wrong_results=tuple(int(token_of[step.start(4)]) for step in wrong),
    )


def _of(row: Row) -> FirstAttempt | None:
    return first_attempt(row["question"], row["text"], row["response"], row["tokens"])


def with_first_wrong(frame: pd.DataFrame) -> pd.DataFrame:
    """Add a column `first_wrong`, the index of the first attempt's first wrong token; None where unknown."""
    attempts = map(_of, frame.to_dict(orient="records"))
    found = [attempt.first_wrong if attempt else None for attempt in attempts]
    return frame.assign(first_wrong=pd.Series(found, dtype=object, index=frame.index))


def wrong_responses(frame: pd.DataFrame) -> list[tuple[Row, FirstAttempt]]:
    """Select the responses with r=0 whose first attempt is wrong, with that attempt. Empty for a task without steps."""
    known = [(row, _of(row)) for row in frame.to_dict(orient="records") if row["reward"] == 0]
    return [(row, attempt) for row, attempt in known if attempt is not None and attempt.first_wrong is not None]


SIGNALS = {
    "KL": lambda row: np.asarray(row["kl"]),
    "token KL reward": lambda row: np.asarray(row["token_kl_reward"]),
    "student's surprise": lambda row: -np.asarray(row["student_logprob"]),
}
"""Signals that may mark a token. The student's surprise, -log p of the sampled token, needs no teacher."""


def hits(frame: pd.DataFrame) -> pd.DataFrame:
    """Measure how often a signal is largest, within the first attempt, at its first wrong token.

    Counts the `wrong_responses` except those whose first attempt only ends too early.

    Returns:
        One row per signal. `hit`: share of responses, with its standard error; `hit_anywhere`: share where it is the
        largest of the whole response; `chance`: hit rate of a random token of the first attempt; `chance_result`: that
        of a random step's result; `responses`. No rows without such responses.
    """
    wrong = [(row, a) for row, a in wrong_responses(frame) if (a.first_wrong or 0) < a.num_tokens]
    if not wrong:
        return pd.DataFrame()
    chance = np.mean([1 / a.num_tokens for _, a in wrong])
    chance_result = np.mean([(a.first_wrong in a.results) / max(1, len(a.results)) for _, a in wrong])
    rows = []
    for name, signal in SIGNALS.items():
        values = [(signal(row), attempt) for row, attempt in wrong]
        hit, error = mean_and_error([float(np.argmax(v[: a.num_tokens]) == a.first_wrong) for v, a in values])
        anywhere = np.mean([np.argmax(v) == a.first_wrong for v, a in values])
        rows.append((name, hit, error, anywhere, chance, chance_result, len(wrong)))
    columns = ["signal", "hit", "hit_se", "hit_anywhere", "chance", "chance_result", "responses"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def by_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Measure the KL by kind of token, over the `wrong_responses`.

    Returns:
        One row per kind: `kl`, mean over its tokens in nats, over the responses that have any, with its standard
        error; `holds_largest`: share of responses whose largest KL is of this kind; `tokens`: their number. No rows
        without such responses.
    """
    wrong = wrong_responses(frame)
    means: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens, largest = Counter(), Counter()
    for row, attempt in wrong:
        kinds = np.array([attempt.kind(token) for token in range(len(row["tokens"]))])
        tokens.update(kinds.tolist())
        largest[kinds[np.argmax(row["kl"])]] += 1
        for kind in set(kinds.tolist()):
            means[kind].append(float(np.asarray(row["kl"])[kinds == kind].mean()))
    rows = [(kind, *mean_and_error(means[kind]), largest[kind] / len(wrong), tokens[kind]) for kind in KINDS if wrong]
    return pd.DataFrame(rows, columns=pd.Index(["kind", "kl", "kl_se", "holds_largest", "tokens"]))
