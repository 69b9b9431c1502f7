"""The one place that builds token sequences, and the teacher contexts.

    prompt      = chat_template(system?, user=x, add_generation_prompt=True)
    body(y)     = the sampled ids of y without its end-of-turn token
    bridge(r)   = ids("\\n\\n" + P_r + "\\n\\n")
    collect     : sample y_revised from   prompt + body(y_init) + bridge(r)
    L_revision  : the same prefix, loss on y_revised + end-of-turn                           (eq. 1)
    L_generation: prompt, loss on body(y_init) + bridge(r) + y_revised + end-of-turn         (eq. 2)
    student     : prompt | y
    teacher     : prompt + body(y) + bridge(r) | the same y                                  (eq. 4)

A response is never decoded and encoded again: what was sampled is what is trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdzero.types import Prompt, Question, ScoredRollout, TeacherContext, TokenIds, Trace


@dataclass(frozen=True)
class ControlPhrases:
    """P_r of section 2.1.

    Args:
        correct: P_1, said after a response with reward 1.
        incorrect: P_0, said after a response with reward 0.
    """

    correct: str = "Let me rephrase the above solution."
    incorrect: str = "Wait, this response is not correct, let me start over."

    def __getitem__(self, reward: int) -> str:
        return self.correct if reward else self.incorrect


class PromptBuilder:
    """Builds every token sequence from a tokenizer with a chat template.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        end_ids: every id that ends a turn; the tokenizer's own end-of-sequence id is the canonical one.
        system: system message, or None for the template's own default.
        control_phrases: P_0 and P_1.
        chat_template_kwargs: passed to the chat template, e.g. `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int] = (),
        system: str | None = None,
        control_phrases: ControlPhrases = ControlPhrases(),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned "
                "model, or put a chat_template.jinja beside its tokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token: a response could not end")
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        self.end_ids = frozenset({*end_ids, self.end_id})
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.system = system
        self.control_phrases = control_phrases
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._bridges = tuple(self._encode(f"\n\n{control_phrases[r]}\n\n") for r in (0, 1))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> PromptBuilder:
        """Tokenizer and end-of-turn ids of a model folder or hub id; `kwargs` as in the constructor."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(path)
        try:
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # the file is optional: then the tokenizer's own end token is the only one
            eos = None
        return cls(tokenizer, end_ids=eos if isinstance(eos, list) else [] if eos is None else [eos], **kwargs)

    def _encode(self, text: str) -> TokenIds:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, user: str) -> TokenIds:
        """Ids of the chat template around one user message, ready for the assistant's answer."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = self.tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": user}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )
        return tuple(ids)

    def prompt(self, question: Question) -> Prompt:
        return Prompt(question, self.chat(question.text))

    def body(self, response_ids: Sequence[int]) -> TokenIds:
        """A response's ids without the end-of-turn token, stripped by id."""
        end = len(response_ids)
        while end and response_ids[end - 1] in self.end_ids:
            end -= 1
        return tuple(response_ids[:end])

    def bridge(self, reward: int) -> TokenIds:
        """Ids of the control phrase P_r with its blank lines."""
        return self._bridges[reward]

    def revision_prompt(self, scored: ScoredRollout) -> Prompt:
        """What a revision is sampled from: prompt + body(y_init) + bridge(r)."""
        rollout, reward = scored.rollout, scored.verdict.reward
        ids = rollout.prompt.token_ids + self.body(rollout.token_ids) + self.bridge(reward)
        return Prompt(rollout.prompt.question, ids)

    def trace(self, initial: ScoredRollout, revised_ids: Sequence[int]) -> Trace:
        """A row of D_revision from an initial response and a sampled revision of it."""
        rollout, reward = initial.rollout, initial.verdict.reward
        return Trace(
            question=rollout.prompt.question,
            prompt_ids=rollout.prompt.token_ids,
            init_ids=self.body(rollout.token_ids),
            bridge_ids=self.bridge(reward),
            revised_ids=(*self.body(revised_ids), self.end_id),
            reward=reward,
        )

    def demonstration(self, question: Question, solution: str) -> Trace:
        """A trace without y_init from a written solution (SFT)."""
        revised = (*self._encode(solution), self.end_id)
        return Trace(question, self.prompt(question).token_ids, (), (), revised, None)


class Context(ABC):
    """What the teacher reads before y. One class per system of the paper's table 2."""

    @abstractmethod
    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        """The context for one response; `siblings` are all responses of the batch to the same question."""

    def max_extra_tokens(self, builder: PromptBuilder, max_new_tokens: int) -> int:
        """Upper bound of what the context adds to the prompt; 0 where it is not known beforehand."""
        return 0


class Plain(Context):
    """The prompt alone: on-policy distillation from another model."""

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        return TeacherContext(scored.rollout.prompt.token_ids)


class Revision(Context):
    """SD-Zero's reviser: prompt + body(y) + bridge(r), equation 4."""

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        return TeacherContext(builder.revision_prompt(scored).token_ids)

    def max_extra_tokens(self, builder: PromptBuilder, max_new_tokens: int) -> int:
        return max_new_tokens + max(len(builder.bridge(r)) for r in (0, 1))


class Demonstration(Context):
    """A worked solution beside the question (SDFT, OPSD).

    Args:
        template: user message with the fields {question} and {demonstration}.
        meta_key: the key of the question's `meta` that holds the solution.
    """

    def __init__(
        self,
        template: str = "{question}\n\nHere is a reference solution:\n{demonstration}\n\n"
        "After reading it, answer the question in your own words.",
        meta_key: str = "solution",
    ) -> None:
        self.template, self.meta_key = template, meta_key

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question = scored.rollout.prompt.question
        if not question.meta.get(self.meta_key):
            raise ValueError(
                f"question {question.id!r} has no meta[{self.meta_key!r}]: the Demonstration context needs a solution; "
                "name the right meta_key, or use FinalAnswer or Revision"
            )
        filled = self.template.format(question=question.text, demonstration=question.meta[self.meta_key])
        return TeacherContext(builder.chat(filled))


class FinalAnswer(Context):
    """Only the gold answer beside the question (table 8).

    Args:
        template: user message with the fields {question} and {answer}.
    """

    def __init__(self, template: str = "{question}\n\nThe correct final answer is: {answer}") -> None:
        self.template = template

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question = scored.rollout.prompt.question
        return TeacherContext(builder.chat(self.template.format(question=question.text, answer=question.answer)))


class Feedback(Context):
    """The verifier's feedback on y, and a sibling's success where there is one (SDPO).

    Args:
        template: user message with the fields {question} and {feedback}.
    """

    def __init__(self, template: str = "{question}\n\nFeedback on an earlier attempt: {feedback}") -> None:
        self.template = template

    def __call__(
        self, builder: PromptBuilder, scored: ScoredRollout, siblings: Sequence[ScoredRollout]
    ) -> TeacherContext:
        question, verdict = scored.rollout.prompt.question, scored.verdict
        read = "" if verdict.parsed is None else f" (answer read: {verdict.parsed})"
        feedback = f"{verdict.reason}{read}."
        success = next((s for s in siblings if s.verdict.reward and s.rollout is not scored.rollout), None)
        if success is not None:
            feedback += f"\nA correct attempt was:\n{success.rollout.text}"
        return TeacherContext(builder.chat(self.template.format(question=question.text, feedback=feedback)))
