"""One optimizer step of self-distillation on stored responses: ours, TRL's two trainers, and a plain loop.

    python benchmarks/sd_step.py [--small] [--rounds N] [--case NAME]

Without sampling: every side does its training step on the same responses y, from token lists to AdamW. The teacher is a
frozen copy of the student that reads x + y + P_r. About six minutes on one core.

`sdzero` and `plain` (one sequence at a time, all logits) minimise the reverse KL over the whole vocabulary, and so does
TRL's DistillationTrainer; their first losses must agree. A subclass gives that trainer a context for the teacher.
`sdzero top-64` renormalises over the teacher's 64 likeliest tokens; SDFTTrainer takes the student's 64 and one bucket
for the rest. TRL pads the responses of a sampling batch to the longest of them. SDFTTrainer is measured both so and
with sampling per micro batch, which avoids the padding but makes real sampling slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loops
import stored
import torch
from loops import Side
from stored import Case, spread
from torch import Tensor, nn

from sdzero.losses import Divergence
from sdzero.methods import SelfDistill
from sdzero.models.language_model import ModelConfig
from sdzero.types import RolloutBatch, ScoredRollout, TokenIds

TOP_K = 64
CASES = (
    Case("even, V=4,096", 4096, spread(8, 200, 413), max_tokens=1024),
    Case("skewed, V=4,096", 4096, spread(8, 40, 1024, skew=4.0), max_tokens=1024),
    Case("short, V=151,936", 151_936, spread(6, 20, 72), max_tokens=2048, rows=2),
)
SMALL = Case("small", 256, spread(4, 3, 12), max_tokens=64, shape=stored.TINY)
ALIKE = ({"sdzero", "plain", "TRL DistillationTrainer"},)


class Rows:
    """Stored responses in the form of the peers: ids, and the teacher's context as ids and as text."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder, self.case = folder, case
        self.builder = ModelConfig(str(folder)).builder()
        self.scored: list[ScoredRollout] = stored.stored_responses(self.builder, case)
        self.prompts: list[TokenIds] = [s.rollout.prompt.token_ids for s in self.scored]
        self.responses: list[TokenIds] = [s.rollout.token_ids for s in self.scored]
        self.contexts: list[TokenIds] = [self.builder.revision_prompt(s).token_ids for s in self.scored]
        self.num_tokens = sum(map(len, self.responses))

    def dataset(self) -> Any:
        from datasets import Dataset  # pyright: ignore[reportMissingImports]

        both = zip(self.prompts, self.contexts, strict=True)
        texts = [(stored.as_text(self.builder, p), stored.as_text(self.builder, c[len(p) :])) for p, c in both]
        return Dataset.from_list([{"prompt": prompt, "privileged_context": extra} for prompt, extra in texts])

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Replace sampling by the stored responses."""
        by_prompt = dict(zip(self.prompts, self.responses, strict=True))
        return [list(by_prompt[tuple(ids)]) for ids in prompts]


def sdzero(rows: Rows, divergence: Divergence) -> Side:
    def make() -> SelfDistill:
        return SelfDistill(
            ModelConfig(str(rows.folder)),
            optimizer=loops.adamw,
            max_grad_norm=loops.MAX_GRAD_NORM,
            max_tokens_per_micro_batch=rows.case.max_tokens,
            divergence=divergence,
        )

    # the budget counts the student's pass over y and the teacher's
    return loops.ours(make, lambda _, step: RolloutBatch(rows.scored, step, step), 2 * rows.num_tokens)


def plain(rows: Rows) -> Side:
    def step(models: list[nn.Module], side: Side) -> None:
        student, teacher = models
        for prompt, context, response in zip(rows.prompts, rows.contexts, rows.responses, strict=True):
            with torch.no_grad():
                log_t = loops.predictions(teacher, context, response).log_softmax(-1)
            log_s = loops.predictions(student, prompt, response).log_softmax(-1)
            loss = (log_s.exp() * (log_s - log_t)).sum() / rows.num_tokens
            loss.backward()
            side.loss += loss.detach()
            side.tokens += len(log_s)

    return loops.plain(rows.folder, step, rows.num_tokens, num_models=2)


def sdft(rows: Rows, by_micro_batch: bool) -> Side:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # pyright: ignore[reportMissingImports]

    def make(side: Side) -> SDFTTrainer:
        class Stored(SDFTTrainer):
            def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
                return prompt_ids, rows.generate(prompt_ids)

            def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                side.loss += loss.detach()
                side.tokens += inputs["completion_mask"].sum()
                return loss

        config = SDFTConfig(
            **loops.trl_options(rows.folder, rows.case.rows, len(rows.scored)),
            distillation_mode="topk_logits",
            distillation_topk=TOP_K,
            distillation_add_tail=True,
            distillation_alpha=1.0,
            teacher_model_kind="base",
            teacher_prompt_template="{prompt} {privileged_context}",
            max_prompt_length=None,
            max_completion_length=max(rows.case.lengths),
            num_generations=1,
            steps_per_generation=1 if by_micro_batch else None,
        )
        tokenizer = rows.builder.tokenizer
        return Stored(str(rows.folder), args=config, train_dataset=rows.dataset(), processing_class=tokenizer)

    return loops.trl(make, rows.num_tokens)


def distillation(rows: Rows) -> Side:
    from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]

    context_of = dict(zip(rows.prompts, rows.contexts, strict=True))

    def make(side: Side) -> DistillationTrainer:
        class Stored(DistillationTrainer):
            def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
                return rows.generate(prompt_ids)

            def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
                batch = super()._generate_and_score_completions(inputs)
                real = [ids[mask.bool()] for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
                contexts = [torch.tensor(context_of[tuple(ids.tolist())]) for ids in real]
                pad = torch.nn.utils.rnn.pad_sequence
                ids = pad(contexts, batch_first=True, padding_side="left").to(batch["prompt_ids"].device)
                mask = pad([torch.ones_like(c) for c in contexts], batch_first=True, padding_side="left").to(ids.device)
                batch["teacher_input_ids"] = torch.cat([ids, batch["completion_ids"]], 1)
                batch["teacher_attention_mask"] = torch.cat([mask, batch["completion_mask"]], 1)
                return batch

            def _compute_loss(self, student: nn.Module, inputs: dict[str, Any], *args: Any) -> Any:
                self.teacher_inputs = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
                loss, *others = super()._compute_loss(student, inputs, *args)
                side.loss += loss.detach()
                side.tokens += inputs["completion_mask"].sum()
                return loss, *others

            def _get_last_hidden_state(self, model: nn.Module, ids: Tensor, mask: Tensor, *args: Any) -> Tensor:
                if model is self.accelerator.unwrap_model(self.teacher_model):
                    ids, mask = self.teacher_inputs
                return super()._get_last_hidden_state(model, ids, mask, *args)

        config = DistillationConfig(
            **loops.trl_options(rows.folder, rows.case.rows, len(rows.scored)),
            beta=1.0,  # reverse KL
            max_completion_length=max(rows.case.lengths),
        )
        return Stored(
            str(rows.folder), str(rows.folder), config, rows.dataset(), processing_class=rows.builder.tokenizer
        )

    return loops.trl(make, rows.num_tokens)


def sides_of(case: Case, folder: Path, with_trl: bool) -> tuple[dict[str, Side], int]:
    rows = Rows(case, folder)
    sides = {
        "sdzero": sdzero(rows, Divergence()),
        "sdzero top-64": sdzero(rows, Divergence(top_k=TOP_K)),
        "plain": plain(rows),
    }
    if with_trl:
        sides |= {
            "TRL SDFTTrainer": sdft(rows, by_micro_batch=False),
            "TRL SDFTTrainer by micro batch": sdft(rows, by_micro_batch=True),
            "TRL DistillationTrainer": distillation(rows),
        }
    return sides, rows.num_tokens


if __name__ == "__main__":
    stored.main("sd_step", __doc__ or "", CASES, SMALL, sides_of, ALIKE)
