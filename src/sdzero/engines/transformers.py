"""Sampling with `transformers`: needs no extra, runs on every torch device, and is bitwise reproducible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from sdzero.engines.base import EngineSpec, OnTokens, RolloutEngine, SyncReport, TokenChunk, ignore, preserve_rng
from sdzero.engines.sync_check import SyncCheck, WeightLayout
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Rollout, Sampling

_CPU = torch.device("cpu")


class TransformersEngine(RolloutEngine):
    """Samples from its own copy of the model in left-padded batches.

    The same prompts, seed and weights give bitwise equal responses. A call is split into batches of `max_batch_size`
    prompts of similar length, which minimises padding.

    Args:
        max_batch_size: prompts sampled at once. It bounds the key-value cache; another size samples other responses.
    """

    def __init__(self, max_batch_size: int = 256) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.max_batch_size = max_batch_size

    def start(self, spec: EngineSpec, builder: PromptBuilder) -> None:
        self._spec, self._builder = spec, builder
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        dtype = getattr(torch, spec.dtype)
        with preserve_rng():
            if spec.load_weights:
                model = AutoModelForCausalLM.from_pretrained(spec.model_path, dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.model_path), dtype=dtype)
        self._model: Any = model
        self._model.generation_config = GenerationConfig()  # otherwise the model's own sampling defaults apply
        self._model.requires_grad_(False).eval().to(self._device)
        self.policy_version = 0 if spec.load_weights else None

    def sync(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> SyncReport:
        started = perf_counter()
        self.policy_version = None  # after an interrupted sync the engine refuses to generate
        held = self._model.state_dict(keep_vars=True)
        check = SyncCheck(WeightLayout.of(self._model), held, getattr(torch, self._spec.dtype))
        with torch.no_grad():
            for name, tensor in check.watch(weights):
                held[name].copy_(tensor)
        checksum = check.finish(held)
        self.policy_version = policy_version
        return SyncReport(perf_counter() - started, checksum)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        self._check_version(policy_version)
        self._check_lengths(prompts, sampling, self._spec.max_model_len)
        rollouts: dict[int, Rollout] = {}
        with preserve_rng(seed), torch.inference_mode():
            for indices in self._batches(prompts):
                rollouts |= zip(indices, self._sample([prompts[index] for index in indices], sampling), strict=True)
        return [rollouts[index] for index in range(len(prompts))]

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Split prompt indices into batches: the longest prompts first, so that memory runs out at once or never; in
        their own order within a batch, so that a single batch samples as it would unsorted."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].token_ids))
        return [sorted(order[i : i + self.max_batch_size]) for i in range(0, len(order), self.max_batch_size)]

    def _sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        rows = [torch.tensor(prompt.token_ids, device=self._device) for prompt in prompts]
        input_ids = pad_sequence(rows, True, self._builder.pad_id, padding_side="left")  # [B, T]
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        recorder = _RecordLogprobs()
        sequences = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_generation_config(sampling, self._builder),
            logits_processor=LogitsProcessorList([recorder]),
            synced_gpus=False,  # ranks sample independently
        )
        logprobs = recorder.finish(sequences[:, -1]).tolist()  # [B, N]
        new_ids = sequences[:, input_ids.shape[1] :].tolist()  # [B, N], padded after an end-of-turn token
        rollouts = []
        for prompt, ids, values in zip(prompts, new_ids, logprobs, strict=True):
            ends = (index + 1 for index, token in enumerate(ids) if token in self._builder.end_ids)
            length = next(ends, len(ids))
            rollouts.append(
                self._rollout(self._builder, prompt, ids[:length], values[:length], sampling.max_new_tokens)
            )
        return rollouts

    def sleep(self) -> None:
        self._model.to(_CPU)

    def wake(self) -> None:
        self._model.to(self._device)

    def close(self) -> None:
        self.policy_version = None
        self._model = None


class _RecordLogprobs(LogitsProcessor):
    """Records the log-probability of each sampled token before temperature and top-p, holding one [B, V] at a time.

    `generate` runs custom processors before its own temperature and top-p; each call receives the token sampled
    from the scores of the previous call.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None  # [B, V]
        self._columns: list[Tensor] = []  # [B] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1])
        self._last = scores.float().log_softmax(-1)
        return scores

    def _record(self, sampled: Tensor) -> None:
        if self._last is not None:
            self._columns.append(self._last.gather(1, sampled[:, None]).squeeze(1))

    def finish(self, sampled: Tensor) -> Tensor:
        """Return log-probabilities [B, N]; `sampled` [B] are the last step's tokens, which no call has received."""
        self._record(sampled)
        return torch.stack(self._columns, dim=1)


def _generation_config(sampling: Sampling, builder: PromptBuilder) -> GenerationConfig:
    """Set every option that affects sampling; the others would come from library defaults such as top_k=50."""
    options: dict[str, Any] = dict(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(builder.end_ids),
        pad_token_id=builder.pad_id,
        do_sample=sampling.temperature > 0,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        return_dict_in_generate=False,
    )
    if sampling.temperature > 0:
        options |= dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    return GenerationConfig(**options)
