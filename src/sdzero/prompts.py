"""The token sequences of collection, training and evaluation.

    prompt      = chat_template(system?, user=x, add_generation_prompt=True)
    body(y)     = the sampled ids of y without its end-of-turn token
    bridge(r)   = ids("\\n\\n" + P_r + "\\n\\n")
    collect     : sample y_revised from   prompt + body(y_init) + bridge(r)
    L_revision  : the same prefix, loss on y_revised + end-of-turn                           (eq. 1)
    L_generation: prompt, loss on body(y_init) + bridge(r) + y_revised + end-of-turn         (eq. 2)
    student     : prompt | y
    teacher     : prompt + body(y) + bridge(r) | the same y                                  (eq. 4)

A response is never decoded and encoded again: training uses the sampled ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdzero.types import Prompt, Question, ScoredRollout, TokenIds, Trace


@dataclass(frozen=True)
class ControlPhrases:
    """Control phrases P_r of section 2.1.

    Args:
        correct: P_1, which follows a response with reward 1.
        incorrect: P_0, which follows a response with reward 0.
    """

    correct: str = "Let me rephrase the above solution."
    incorrect: str = "Wait, this response is not correct, let me start over."

    def __getitem__(self, reward: int) -> str:
        return self.correct if reward else self.incorrect


class PromptBuilder:
    """Builder of all token sequences.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        end_ids: ids that end a turn, in addition to the tokenizer's end-of-sequence id.
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
        self.max_bridge_len = max(map(len, self._bridges))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> PromptBuilder:
        """Make a builder for a model folder or hub id; `kwargs` as in the constructor."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(path)
        try:
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # the file is optional; without it only the tokenizer's end token ends a turn
            eos = None
        return cls(tokenizer, end_ids=eos if isinstance(eos, list) else [] if eos is None else [eos], **kwargs)

    def _encode(self, text: str) -> TokenIds:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, user: str) -> TokenIds:
        """Return the ids of the chat template around one user message, up to the assistant's answer."""
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
        """Put the question into the chat template."""
        return Prompt(question, self.chat(question.text))

    def max_prompt_len(self, questions: Iterable[Question]) -> int:
        """Return the length of the longest prompt; 0 without questions."""
        return max((len(self.prompt(question).token_ids) for question in questions), default=0)

    def body(self, response_ids: Sequence[int]) -> TokenIds:
        """Return a response's ids without trailing end-of-turn tokens."""
        end = len(response_ids)
        while end and response_ids[end - 1] in self.end_ids:
            end -= 1
        return tuple(response_ids[:end])

    def bridge(self, reward: int) -> TokenIds:
        """Return the ids of the control phrase P_r with its blank lines."""
        return self._bridges[reward]

    def revision_prompt(self, scored: ScoredRollout) -> Prompt:
        """Return the prompt of a revision: prompt + body(y_init) + bridge(r)."""
        rollout, reward = scored.rollout, scored.verdict.reward
        ids = rollout.prompt.token_ids + self.body(rollout.token_ids) + self.bridge(reward)
        return Prompt(rollout.prompt.question, ids)

    def trace(self, initial: ScoredRollout, revised_ids: Sequence[int]) -> Trace:
        """Make a row of D_revision from an initial response and a sampled revision of it."""
        rollout, reward = initial.rollout, initial.verdict.reward
        return Trace(
            question=rollout.prompt.question,
            prompt_ids=rollout.prompt.token_ids,
            init_ids=self.body(rollout.token_ids),
            bridge_ids=self.bridge(reward),
            revised_ids=(*self.body(revised_ids), self.end_id),
            reward=reward,
        )

    def answer_trace(self, scored: ScoredRollout) -> Trace:
        """Make a trace without y_init from a sampled response (RFT)."""
        prompt = scored.rollout.prompt
        answer = (*self.body(scored.rollout.token_ids), self.end_id)
        return Trace(prompt.question, prompt.token_ids, (), (), answer, None)

    def demonstration(self, question: Question, solution: str) -> Trace:
        """Make a trace without y_init from a written solution (SFT)."""
        revised = (*self._encode(solution), self.end_id)
        return Trace(question, self.prompt(question).token_ids, (), (), revised, None)
