"""A collection with scripted answers of every kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdzero.data.collect import Collect
from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineError
from sdzero.models.language_model import ModelConfig
from sdzero.tasks import Chains
from sdzero.types import Prompt, Rollout, Sampling
from support.runs import ROOT

TINY = ROOT / "configs/tiny_model"
LIMIT = 12
QUESTIONS = 23


class Actor(ScriptedEngine):
    """Right, wrong, unparseable and endless answers, chosen from the call's seed; it may die in a call.

    `log` holds (prompt, text) of all answers it gave, in order.
    """

    def __init__(self, dies_in: int | None = None, right: float = 0.4, num_wordings: int = 1) -> None:
        super().__init__(self._answer)
        self.dies_in, self.right, self.num_wordings = dies_in, right, num_wordings
        self.log: list[tuple[Prompt, str]] = []
        self.is_warm = False

    def warm_up(self) -> None:
        assert self.policy_version == 0, "the weights are there"
        self.is_warm = True

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int, *rest: Any, **more: Any
    ) -> list[Rollout]:
        assert self.is_warm
        self._rng = random.Random(seed)
        rollouts = super().generate(prompts, sampling, seed, policy_version, *rest, **more)
        if self.num_generate_calls == self.dies_in:
            raise EngineError("the engine died in the middle of a call")
        self.log += [(prompt, rollout.text) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        return rollouts

    def _answer(self, prompt: Prompt, seed: int) -> str:
        place = self._rng.randrange(self.num_wordings) if self.num_wordings > 1 else 0
        right = f"{('1+1=2', '3-1=2', '5-3=2')[place]}A{prompt.question.answer}"
        wrong = f"2*1=2A{(int(prompt.question.answer) + 1) % 10}"
        endless = "1+1=2" + "1" * (LIMIT - 7) + f"A{prompt.question.answer}111"  # cut where it reads as right
        others = [(wrong, 0.3), ("1+1=2", 0.15), (endless, 0.15)]
        choices = [(right, self.right), *others]
        return self._rng.choices([c for c, _ in choices], [w for _, w in choices])[0]


def collect(model: ModelConfig, out: Path, engine: ScriptedEngine | None = None, **options: Any) -> Actor:
    engine = engine or Actor()
    defaults: dict[str, Any] = {"num_questions": QUESTIONS, "num_traces": None, "call_size": 4}
    sampling = Sampling(temperature=0.7, max_new_tokens=LIMIT)
    Collect(model, Chains(), engine, out, **{**defaults, "sampling": sampling, **options}).run()
    assert isinstance(engine, Actor)
    return engine
