"""SD-Zero in one flat file: base -> collect -> SRT -> SelfDistill, with transformers and torch alone.

    python notebooks/sd_zero_loop.py

trains a tiny Qwen3 on chains of digits in under a minute on one CPU core and prints a line per phase. It shows the
mechanics, not the gain: a model this small, trained this briefly, learns next to nothing from its own revisions.
Equation numbers are the paper's (https://arxiv.org/abs/2604.12002).

The package `sdzero` computes the same losses and the same D_revision, and adds what a real run needs: vLLM, sharding,
micro batches, loss heads that never hold all logits, checkpoints and resume, other tasks and methods.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, get_scheduler

MODEL = Path(__file__).resolve().parents[1] / "configs" / "tiny_model"  # config and tokenizer; weights are random
CONTROL_PHRASES = (
    "Wait, this response is not correct, let me start over.",  # P_0 follows a wrong response: restart
    "Let me rephrase the above solution.",  # P_1 follows a correct one: rephrase
)
MAX_NEW_TOKENS = 64
NUM_REVISIONS = 3

# ---------------------------------------------------------------------------------------------------------------------
# The task: `6+3*9=` worked from left to right modulo 10, `6+3=9*9=1A1`; the answer is the digit after the last A.


class Question(NamedTuple):
    text: str  # x
    answer: str  # a


def working(first: int, steps: Sequence[tuple[str, int]], rng: random.Random, error_rate: float = 0.0) -> str:
    """Write a solution whose steps are each wrong with probability `error_rate`."""
    value, text = first, str(first)
    for operator, operand in steps:
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10
        if rng.random() < error_rate:
            value = (value + rng.randint(1, 9)) % 10
        text += f"{operator}{operand}={value}"
    return f"{text}A{value}"


def stream(rng: random.Random, error_rate: float = 0.2) -> Iterator[tuple[Question, str]]:
    """Yield distinct questions, each with a noisy document that answers it, for pre-training.

    A fifth of the documents hold a second attempt after a control phrase, chosen regardless of the first one's answer:
    the base learns the form of a revision, not when or how to revise.
    """
    seen = set()
    while True:
        first, steps = rng.randrange(10), [(rng.choice("+-*"), rng.randrange(10)) for _ in range(rng.randint(1, 2))]
        text = f"{first}{''.join(f'{operator}{operand}' for operator, operand in steps)}="
        if text in seen:
            continue
        seen.add(text)
        document = working(first, steps, rng, error_rate)
        if rng.random() < 0.2:
            document += f"\n\n{rng.choice(CONTROL_PHRASES)}\n\n{working(first, steps, rng, error_rate)}"
        yield Question(text, working(first, steps, rng)[-1]), document


def verify(question: Question, response: str) -> int:
    """Return the binary reward r: 1 if the digit after the last A is the gold answer."""
    found = re.fullmatch("[0-9]", response.rpartition("A")[2].strip()) if "A" in response else None
    return int(found is not None and found[0] == question.answer)


# ---------------------------------------------------------------------------------------------------------------------
# Token sequences. What was sampled is what is trained on: no response is decoded and encoded again.

tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
END, PAD = tokenizer.eos_token_id, tokenizer.pad_token_id
Ids = tuple[int, ...]


class Rollout(NamedTuple):
    question: Question
    prompt: Ids  # what y was sampled from
    y: Ids  # sampled tokens, the end-of-turn token included unless y was cut
    reward: int


class Trace(NamedTuple):
    """Row of D_revision: prompt | body(y_init) | bridge(r) | y_revised."""

    prompt: Ids
    init: Ids
    bridge: Ids
    revised: Ids
    reward: int


def encode(text: str) -> Ids:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def chat(question: Question) -> Ids:
    messages = [{"role": "user", "content": question.text}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def body(y: Ids) -> Ids:
    """Strip the end-of-turn token, by its id."""
    return y[:-1] if y and y[-1] == END else y


def bridge(reward: int) -> Ids:
    return encode(f"\n\n{CONTROL_PHRASES[reward]}\n\n")


def revision_prompt(rollout: Rollout) -> Ids:
    """Build x, y, P_r: the context of a revision, and of the reviser that scores y in phase 2."""
    return rollout.prompt + body(rollout.y) + bridge(rollout.reward)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and log-probabilities.


@torch.no_grad()
def sample(model: Any, prompts: Sequence[Ids], temperature: float = 1.0) -> list[Ids]:
    """Sample one response per prompt, in one left-padded batch."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    rows = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [tuple(row[: row.index(END) + 1] if END in row else row) for row in rows]


Sampler = Callable[[list[Ids]], list[Ids]]


def rollouts(sampler: Sampler, questions: Sequence[Question], prompts: Sequence[Ids]) -> list[Rollout]:
    """Sample and verify; a response that was cut at MAX_NEW_TOKENS has reward 0 whatever it contains."""
    scored = []
    for question, prompt, y in zip(questions, prompts, sampler(list(prompts)), strict=True):
        reward = verify(question, tokenizer.decode(body(y))) if y[-1] == END else 0
        scored.append(Rollout(question, prompt, y, reward))
    return scored


def logprobs(model: Any, contexts: Sequence[Ids], targets: Sequence[Ids]) -> list[Tensor]:
    """Compute log pi(. | context, target_<t) [T, V] at every token of each target, from one right-padded batch.

    Causal attention never looks right, so padding needs no mask.
    """
    rows = [torch.tensor(context + target) for context, target in zip(contexts, targets, strict=True)]
    logits = model(pad_sequence(rows, batch_first=True, padding_value=PAD)).logits.log_softmax(-1)
    return [
        row[len(context) - 1 : len(context) + len(target) - 1]
        for row, context, target in zip(logits, contexts, targets, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The losses. The paper sums over tokens; as in sdzero's default, each term here is a mean over its own tokens.


def srt_loss(model: Any, traces: Sequence[Trace]) -> Tensor:
    """Equation 3, L_SRT = L_revision + L_generation, from one forward pass: both terms read the same sequence.

    L_revision (equation 1) is the surprisal of y_revised given x, y_init, P_r; L_generation (equation 2) that of
    [y_init, P_r, y_revised] given x. A trace without y_init, a demonstration, has the second term only.
    """
    targets = [trace.init + trace.bridge + trace.revised for trace in traces]
    log_p = logprobs(model, [trace.prompt for trace in traces], targets)
    surprisals = [-p[torch.arange(len(y)), torch.tensor(y)] for p, y in zip(log_p, targets, strict=True)]
    generation = torch.cat(surprisals).mean()
    revised = [s[-len(trace.revised) :] for s, trace in zip(surprisals, traces, strict=True) if trace.init]
    return generation + torch.cat(revised).mean() if revised else generation


def self_distill_loss(student: Any, teacher: Any, scored: Sequence[Rollout]) -> Tensor:
    """Equation 4: KL(student || teacher) at every token of y, the mean over all tokens.

    The student reads x, the teacher x, y, P_r; both are asked for the next token of the same y.
    """
    ys = [rollout.y for rollout in scored]
    log_s = torch.cat(logprobs(student, [rollout.prompt for rollout in scored], ys))
    with torch.no_grad():
        log_t = torch.cat(logprobs(teacher, [revision_prompt(rollout) for rollout in scored], ys))
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The phases.


def collect(sampler: Sampler, questions: Sequence[Question]) -> tuple[list[Trace], list[Rollout]]:
    """Build D_revision (section 2.1): sample y_init, verify, sample revisions after P_r, keep the correct ones."""
    first = rollouts(sampler, questions, [chat(question) for question in questions])
    repeated = [rollout for rollout in first for _ in range(NUM_REVISIONS)]
    revisions = rollouts(sampler, [r.question for r in repeated], [revision_prompt(r) for r in repeated])
    traces = [
        Trace(init.prompt, body(init.y), bridge(init.reward), revision.y, init.reward)
        for init, revision in zip(repeated, revisions, strict=True)
        if revision.reward
    ]
    return traces, first


def train(
    model: Any, losses: Iterator[Tensor], num_steps: int, lr: float, schedule: str, weight_decay: float, warmup: int
) -> list[float]:
    """Take one optimizer step per loss; `losses` computes each from the weights as they then are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    curve = []
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def accuracy(model: Any, questions: Sequence[Question]) -> float:
    scored = rollouts(lambda p: sample(model, p, temperature=0.7), questions, [chat(q) for q in questions])
    return sum(rollout.reward for rollout in scored) / len(scored)


def main(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    rng, started = random.Random(seed), time.monotonic()
    base_steps, srt_steps, sd_steps = (max(1, round(n * scale)) for n in (100, 6, 5))
    documents = stream(rng)  # its questions never repeat, so those of all phases are disjoint
    held_out, phase1 = ([next(documents)[0] for _ in range(n)] for n in (32, 64))

    def report(phase: str, text: str) -> None:
        seconds = time.monotonic() - started
        print(f"{phase:<12}{text} | held-out accuracy {accuracy(model, held_out):.2f} | {seconds:.0f} s", flush=True)

    def curve(values: list[float]) -> str:
        return f"{len(values)} steps, loss {values[0]:.3f} -> {values[-1]:.3f}"

    # Base: next-token prediction on noisy documents, which is srt_loss on traces without y_init.
    def demonstrations(n: int) -> list[Trace]:
        pairs = [next(documents) for _ in range(n)]
        return [Trace(chat(question), (), (), (*encode(document), END), 0) for question, document in pairs]

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
    losses = (srt_loss(model, demonstrations(32)) for _ in range(base_steps))
    report("base", curve(train(model, losses, base_steps, 4e-3, "cosine", 1e-4, warmup=5)))

    # Phase 1: the base answers and revises, then learns from its verified revisions.
    traces, first = collect(lambda prompts: sample(model, prompts), phase1)
    by_reward = [sum(trace.reward == reward for trace in traces) for reward in (0, 1)]
    report("collect", f"{len(first)} questions, {by_reward[0]} traces with r=0 and {by_reward[1]} with r=1")
    assert traces, "no revision was correct: train the base for longer (--scale 1)"
    losses = (srt_loss(model, rng.sample(traces, min(16, len(traces)))) for _ in range(srt_steps))
    report("SRT", curve(train(model, losses, srt_steps, 2.5e-3, "cosine", 1e-4, warmup=0)))

    # Phase 2: the frozen SRT model is the reviser; every step samples from the student as it is then (on-policy).
    teacher = copy.deepcopy(model).requires_grad_(False)

    def on_policy() -> Iterator[Tensor]:
        for _ in range(sd_steps):
            questions = [next(documents)[0] for _ in range(16)]
            scored = rollouts(lambda prompts: sample(model, prompts), questions, [chat(q) for q in questions])
            yield self_distill_loss(model, teacher, scored)

    report("SelfDistill", curve(train(model, on_policy(), sd_steps, 3e-4, "constant_with_warmup", 0.01, warmup=1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SD-Zero on a tiny model, in one file.")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of steps")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
