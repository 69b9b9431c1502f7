"""Batches of traces for SRT, SFT and RFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdzero.data.base import StepDataModule
from sdzero.data.eval_stream import check_positive
from sdzero.data.trace_file import read_traces
from sdzero.prompts import PromptBuilder
from sdzero.tasks.base import TraceSource
from sdzero.types import Question, Trace, TraceBatch


class TraceFile(TraceSource):
    """D_revision as `sdzero collect` writes it.

    Args:
        path: JSONL file, one trace a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def traces(self, builder: PromptBuilder) -> list[Trace]:
        if not self.path.is_file():
            raise FileNotFoundError(f"data.source.path: no traces at {self.path}; `sdzero collect` writes them")
        traces = read_traces(self.path)
        if not traces:
            raise ValueError(f"data.source.path: {self.path} holds no trace: no revision was verified as correct")
        for trace in traces:
            if trace.reward is not None and trace.bridge_ids != builder.bridge(trace.reward):
                raise ValueError(
                    f"{self.path}: question {trace.question.id!r} was collected with other control phrases or "
                    "another tokenizer than student.control_phrases and student.path give now"
                )
        return traces


class TraceDataModule(StepDataModule):
    """Traces in batches of one optimizer step; validation samples from the policy where an engine is given.

    Args:
        source: source of the traces.
        traces_per_step: number of traces of one optimizer step, over all ranks.
        kwargs: as in StepDataModule; a task and an engine are needed for evaluation only.
    """

    def __init__(self, source: TraceSource, traces_per_step: int = 4, **kwargs: Any) -> None:
        check_positive(traces_per_step=traces_per_step)
        super().__init__(traces_per_step, **kwargs)
        self.source = source
        self.traces: list[Trace] = []

    @property
    def num_items(self) -> int:
        return len(self.traces)

    def training_questions(self) -> list[Question]:
        return [trace.question for trace in self.traces]

    def setup_training(self) -> None:
        self.traces = list(self.source.traces(self.policy.builder))
        if shared := sorted({t.question.identity for t in self.traces} & {q.identity for q in self.eval_questions}):
            raise ValueError(f"{len(shared)} questions of the traces are also in the evaluation, e.g. {shared[:3]}")
        longest = max(len(t.prompt_ids + t.init_ids + t.bridge_ids + t.revised_ids) for t in self.traces)
        if longest > self.max_positions:
            raise ValueError(
                f"the longest trace has {longest} tokens, but the model has {self.max_positions} positions"
            )

    def make_batch(self, counter: int, indices: Sequence[int]) -> TraceBatch:
        return TraceBatch([self.traces[i] for i in indices], counter)
