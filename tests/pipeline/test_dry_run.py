"""`sdzero run --dry-run`: its counts are the paper's and a real run's, its bytes those of real tensors."""

from __future__ import annotations

import copy
import math
import re
import socket
import weakref
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from sdzero.cli.stage_commands import check_stage
from sdzero.losses import Divergence, cross_entropy_head, divergence_head
from sdzero.losses.soft_targets import HiddenTargets
from sdzero.methods import SRT, SelfDistill
from sdzero.models.language_model import LanguageModel
from sdzero.models.lora import AdaptersOff, Lora, add_adapters, num_adapter_parameters
from sdzero.pipeline.dry_run import Estimate, estimate
from sdzero.pipeline.dry_run.assumptions import ASSUMPTIONS, Architecture, load_architecture, load_assumptions
from sdzero.pipeline.dry_run.budget import Budget, count_passes, count_validations
from sdzero.pipeline.dry_run.memory import Machine, MemoryPeak, machine
from sdzero.pipeline.dry_run.sampling import BATCHED_TOKENS, cache_bytes
from sdzero.pipeline.dry_run.tables import total
from sdzero.pipeline.dry_run.training import training_peaks
from sdzero.pipeline.run import parse
from sdzero.pipeline.stages import list_stages
from sdzero.types import Example
from sdzero.utils.recipe import Recipe, load_recipe
from support.runs import ROOT, SMOKE, exit_code, read_json, responses

RECIPES = ROOT / "configs/recipes"
QWEN_MATH = load_recipe(RECIPES / "qwen3-4b-math")
ONE_GPU, CPU = Machine(True, 1, 1, 4), Machine(False, 1, 1, 4)

Configs = dict[str, dict[str, Any]]


def parsed(recipe: Recipe) -> Configs:
    """Whole configs by stage, as `sdzero run --dry-run` has them."""
    return parse(list_stages(recipe, Path("runs") / recipe.name), check_stage)


@pytest.fixture(scope="module")
def paper() -> Configs:
    return parsed(QWEN_MATH)


@pytest.fixture
def changed(paper: Configs) -> Configs:
    """The paper's configs, to be changed."""
    return copy.deepcopy(paper)


def by_stage(plan: Estimate) -> dict[str, Budget]:
    return {row.stage: row for row in plan.budgets}


# --- questions, generations and tokens ------------------------------------------------------------


def test_appendix_c2_comes_out(paper: Configs) -> None:
    """Its own numbers: 40K + 9K generations, 148M + 76.5M tokens sampled, 22.2M + 44.4M + 153M trained."""
    plan = estimate(QWEN_MATH, paper)
    rows = by_stage(plan)
    assert (rows["collect"].generations, rows["collect"].tokens_sampled) == (40_000, 148_000_000)
    assert (rows["self_distill"].generations, rows["self_distill"].tokens_sampled) == (9_000, 76_500_000)
    once = total(plan.one_epoch)
    assert (once.generations, once.tokens_sampled, once.tokens_trained) == (49_000, 224_500_000, 219_600_000)
    assert plan.one_epoch[1].tokens_trained == 22_200_000 + 44_400_000
    # table 4 has three epochs
    assert rows["srt"].tokens_trained == 3 * 66_600_000
    assert rows["self_distill"].tokens_trained == 153_000_000 and rows["self_distill"].at_most
    # six benchmarks x (8 answers + 1 revision), and nothing of it in the sum of the training
    assert rows["srt/eval"].generations == 1129 * 9 and rows["srt/eval"].evaluates
    assert sum(row.generations or 0 for row in plan.budgets if not row.evaluates) == 49_000
    assert any("8,500, is above sampling.max_new_tokens, 8,192" in note for note in plan.memory.notes)


def test_tokens_trained_are_counted_as_the_methods_do() -> None:
    """Without P_r, as in C.2: a trace of two responses of 37 tokens, and a response of 85 read twice."""
    trace = Example("q", (1,), (2,) * 74, num_init=37)
    assert SRT.num_trained(SRT.__new__(SRT), [trace]) == 3 * 37
    assert SelfDistill.num_trained(SelfDistill.__new__(SelfDistill), [Example("q", (1,), (2,) * 85)]) == 2 * 85


def test_a_real_run_sampled_as_much_and_no_more_tokens(smoke_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = estimate(load_recipe(SMOKE), parsed(load_recipe(SMOKE)))
    rows = by_stage(plan)
    for row in rows.values():
        stage, _, validates = row.stage.partition(" ")
        if stage == "srt" and not validates:
            continue  # samples nothing
        folder = smoke_run / stage / "journal"
        kinds = ("eval", "revise") if row.evaluates else ("train", "0") if stage != "collect" else ("",)
        found = [r for kind in kinds for path in (folder, folder / "rank0") for r in responses(path, kind)]
        if stage == "self_distill" and not validates:  # its journal forgets what a checkpoint holds
            assert row.generations == read_json(smoke_run / "summary.json")[2]["num_generations"]
            continue
        assert row.generations == len(found), row.stage
        assert (row.tokens_sampled or 0) >= sum(len(r["token_ids"]) for r in found) > 0
    for row in read_json(smoke_run / "summary.json")[1:]:
        assert rows[row["stage"]].tokens_trained >= row["num_tokens_trained"] > 0
        assert rows[row["stage"]].at_most
    assert any("upper bounds from max_new_tokens" in note for note in plan.memory.notes)
    assert plan.gpu_bytes is None and not plan.memory.refusals and plan.memory.peaks


def trainer(**values: Any) -> dict[str, Any]:
    defaults = {"max_epochs": None, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": None}
    return {"trainer": {**defaults, **values}}


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.none() | st.integers(1, 4), st.just(-1) | st.integers(1, 40))
def test_steps_and_items_are_those_of_a_slow_loop(items: int, per_step: int, epochs: int | None, steps: int) -> None:
    config = trainer(max_epochs=epochs, max_steps=steps)
    passes = count_passes("srt.yaml", config, items, per_step)
    seen = done = 0
    for _ in range(1000 if epochs is None else epochs):
        for start in range(0, items, per_step):
            if done != steps:
                seen, done = seen + min(per_step, items - start), done + 1
    assert (passes.steps, passes.items, passes.per_epoch) == (done, seen, math.ceil(items / per_step))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"check_val_every_n_epoch": None, "val_check_interval": 4}, 5),  # steps 4, 8, ... 20 of 21
        ({}, 2),  # after each whole epoch of 10
        ({"check_val_every_n_epoch": 2}, 1),
        ({"val_check_interval": 0.5}, 4),
        ({"val_check_interval": 3}, 6),
    ],
)
def test_validations(options: dict[str, Any], expected: int) -> None:
    config = trainer(max_steps=21, **options)
    assert count_validations(config, count_passes("srt.yaml", config, 10, 1)) == expected


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"srt\.yaml: trainer\.max_epochs and trainer\.max_steps give"):
        count_passes("srt.yaml", trainer(max_epochs=-1), 10, 1)


def test_traces_are_bounded_by_the_revisions(changed: Configs) -> None:
    changed["collect"] |= {"num_traces": None}
    assert by_stage(estimate(QWEN_MATH, changed))["srt"].questions == 30_000
    changed["collect"] |= {"branches": "incorrect"}  # dry_run.yaml: half of the first attempts are right
    row = by_stage(estimate(QWEN_MATH, changed))["srt"]
    assert row.questions == 15_000 and row.at_most


def test_phase2_only_counts_phase_2_only(paper: Configs) -> None:
    recipe = load_recipe(QWEN_MATH.folder, [ROOT / "configs/ablations/table12_phase2_only"])
    plan = estimate(recipe, {name: config for name, config in paper.items() if not name.startswith(("collect", "srt"))})
    assert total(plan.one_epoch).tokens_sampled == 76_500_000
    assert {peak.stage for peak in plan.memory.peaks} == {"base/eval", "self_distill", "self_distill/eval"}


# --- the architecture -----------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tiny(model_type: str, **overrides: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**TINY, **overrides})


@pytest.mark.parametrize("model_type", ["qwen3", "olmo3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_a_real_model(model_type: str, tied: bool) -> None:
    config = tiny(model_type, tie_word_embeddings=tied)
    model, counted = AutoModelForCausalLM.from_config(config), Architecture.of(config)
    assert counted.num_parameters == sum(p.numel() for p in model.parameters())
    assert counted.num_layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    outside = [p.numel() for name, p in model.named_parameters() if ".layers." not in name]
    assert counted.num_root_parameters == sum(outside)


@pytest.mark.parametrize(
    ("recipe", "millions"), [("qwen3-4b-math", 4022), ("olmo3-7b-math", 7298), ("qwen2.5-7b-countdown", 7616)]
)
def test_the_papers_models_have_the_sizes_of_their_names(recipe: str, millions: int) -> None:
    model = load_architecture("some/hub-id", load_assumptions(load_recipe(RECIPES / recipe)))
    assert model and round(model.num_parameters / 1e6) == millions
    assert (model.num_sliding_layers, model.window) == ((24, 4096) if "olmo" in recipe else (0, 0))


def test_a_model_folder_counts_before_the_assumptions() -> None:
    model = load_architecture(str(ROOT / "configs/tiny_model"), load_assumptions(QWEN_MATH))
    assert model and model.num_parameters < 200_000
    assert load_architecture("some/hub-id", None) is None


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "olmo3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_as_large_as_real_keys_and_values(model_type: str, dtype: torch.dtype) -> None:
    config = tiny(model_type, sliding_window=128)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cache = DynamicCache(config=config)
    model(torch.zeros(1, 50, dtype=torch.long), past_key_values=cache)
    layers: list[Any] = cache.layers
    real = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    assert cache_bytes(Architecture.of(config), 50, dtype.itemsize) == real
    assert cache_bytes(Architecture.of(config), 50, dtype.itemsize, tensor_parallel_size=2) == real // 2
    assert cache_bytes(Architecture.of(config), 50, dtype.itemsize, tensor_parallel_size=4) == real // 2  # two heads


def test_a_sliding_layer_holds_its_window_and_one_batch() -> None:
    model = Architecture.of(tiny("olmo3", sliding_window=128))  # three of four layers slide
    per_token = 2 * 2 * 32 * 2
    assert cache_bytes(model, 100_000, 2) == per_token * (100_000 + 3 * (127 + BATCHED_TOKENS))


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside it, and those it is shown, held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def show(self, tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.show(t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


def training_config(checkpointing: bool) -> dict[str, Any]:
    settings = {"cpu_offload": False, "gradient_checkpointing": checkpointing}
    return {"model": {"init_args": {"student": settings, "optimizer": {"init_args": {}}}}}


class Step:
    """Micro batches of a real model and AdamW, watched by `Live`."""

    def __init__(self, checkpointing: bool, bf16: bool, with_teacher: bool, num_tokens: int) -> None:
        config = tiny("qwen3", hidden_size=128, num_hidden_layers=3, intermediate_size=512, tie_word_embeddings=True)
        self.sizes, self.bf16, self.num_tokens = Architecture.of(config), bf16, num_tokens
        self.student, self.teacher = self._model(config), self._model(config).requires_grad_(False).eval()
        if checkpointing:
            options = {"use_reentrant": False}
            self.student.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.with_teacher = with_teacher
        self.optimizer = torch.optim.AdamW(self.student.parameters())
        self.live = Live()
        self.live.show(iter([*self.student.parameters(), *(self.teacher.parameters() if with_teacher else ())]))

    @staticmethod
    def _model(config: Any) -> LanguageModel:
        return LanguageModel(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")).train()

    def micro_batch(self) -> None:
        ids = torch.zeros(1, self.num_tokens, dtype=torch.long)
        predicts, targets = torch.ones_like(ids, dtype=torch.bool), ids[0]
        weights = torch.ones(self.num_tokens)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
            if not self.with_teacher:
                return cross_entropy_head(hidden, weight, targets, weights, self.num_tokens)
            with torch.no_grad():
                teacher = self.teacher(ids, predicts, HiddenTargets)
            return divergence_head(hidden, weight, teacher, weights, self.num_tokens, Divergence(), targets=targets)

        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            self.student(ids, predicts, head).loss.backward()

    def run(self) -> None:
        with self.live:
            self.micro_batch()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.live.peak = 0
            self.micro_batch()
            self.micro_batch()  # on top of the first one's gradients


def largest(moments: list[MemoryPeak]) -> int:
    return max(peak.total for peak in moments)


def test_what_a_training_keeps_are_real_tensors() -> None:
    step = Step(checkpointing=False, bf16=False, with_teacher=True, num_tokens=16)
    step.run()
    teacher = (step.sizes, 4)
    _, backward, update = training_peaks("x", training_config(False), step.sizes, teacher, CPU, 16, True)
    weights = list(step.student.parameters())
    moments = [step.optimizer.state[p][name] for p in weights for name in ("exp_avg", "exp_avg_sq")]
    grads = [p.grad for p in weights if p.grad is not None]
    for name, tensors in {"weights": weights, "gradients": grads, "optimizer": moments}.items():
        assert backward.parts[name] == sum(t.nbytes for t in tensors), name
    assert backward.parts["teacher"] == sum(p.nbytes for p in step.teacher.parameters())
    assert update.parts["copies"] == 0  # torch's default on the CPU takes one weight after the other
    (*_, on_gpu) = training_peaks("x", training_config(False), step.sizes, teacher, ONE_GPU, 16, True)
    assert on_gpu.parts["copies"] == backward.parts["weights"]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_micro_batch_takes_what_is_said(checkpointing: bool, bf16: bool, with_teacher: bool) -> None:
    """The largest sum of live tensors in a real step, activations and all, over weights small beside them."""
    step = Step(checkpointing, bf16, with_teacher, num_tokens=512)
    step.run()
    at = Machine(False, 1, 1, 2 if bf16 else 4)
    teacher = (step.sizes, 4) if with_teacher else None
    said = largest(training_peaks("x", training_config(checkpointing), step.sizes, teacher, at, 512, True))
    assert 0.95 * step.live.peak <= said <= 1.15 * step.live.peak


LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}


class AdapterStep(Step):
    """A step of adapters alone, with the model beneath them as teacher."""

    def __init__(self, bf16: bool, num_tokens: int) -> None:
        super().__init__(False, bf16, False, num_tokens)
        if bf16:
            self.student.bfloat16()
        add_adapters(self.student.hf, Lora(**LORA))
        self.teacher, self.with_teacher = AdaptersOff(self.student), True
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad])
        self.live = Live()
        self.live.show(self.student.parameters())


@pytest.mark.parametrize("bf16", [True, False])
def test_with_adapters_the_weights_are_kept_once(bf16: bool) -> None:
    step = AdapterStep(bf16, num_tokens=512)
    step.run()
    config = training_config(False)
    config["model"]["init_args"]["student"] |= {"lora": LORA, "dtype": "bfloat16" if bf16 else "float32"}
    at = Machine(False, 1, 1, 2 if bf16 else 4)
    moments_said = training_peaks("x", config, step.sizes, (step.sizes, 0), at, 512, True)
    _, backward, update = moments_said
    trained = [p for p in step.student.parameters() if p.requires_grad]
    moments = [step.optimizer.state[p][name] for p in trained for name in ("exp_avg", "exp_avg_sq")]
    assert sum(p.numel() for p in trained) == step.sizes.num_adapter_parameters(LORA)
    expected = {"weights": step.student.parameters(), "gradients": [p.grad for p in trained], "optimizer": moments}
    for name, tensors in expected.items():
        assert backward.parts[name] == sum(t.nbytes for t in tensors if t is not None), name
    assert backward.parts["teacher"] == 0 and update.parts["gradients"] == backward.parts["gradients"]
    assert 0.95 * step.live.peak <= largest(moments_said) <= 1.15 * step.live.peak


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"]])
def test_adapters_of_chosen_layers_are_counted(targets: list[str]) -> None:
    config = tiny("qwen3", hidden_size=128, intermediate_size=512)
    hf, lora = AutoModelForCausalLM.from_config(config), {**LORA, "target_modules": targets}
    assert Architecture.of(config).num_adapter_parameters(lora) == num_adapter_parameters(hf, Lora(**lora))


def test_a_teacher_that_goes_first_leaves_its_head_alone() -> None:
    model = Architecture.of(tiny("qwen3"))
    config = training_config(False)
    plain, *_ = training_peaks("x", config, model, (model, 2), ONE_GPU, 64, True)
    config["model"]["init_args"]["teacher_first"] = True
    first, *_ = training_peaks("x", config, model, (model, 2), ONE_GPU, 64, True)
    assert plain.parts["teacher"] == 2 * model.num_parameters
    assert first.parts["teacher"] == ONE_GPU.compute_bytes * model.vocab * model.hidden < plain.parts["teacher"]


def test_on_a_gpu_a_chunk_is_larger_and_the_head_is_multiplied_as_it_is_gathered() -> None:
    """By hand: 2,048 tokens of both models' float32 logits and a bfloat16 gradient; heads of a sharded model."""
    model = Architecture.of(tiny("qwen3"))
    sharded = Machine(True, 8, 8, 2)
    (with_one, *_), (with_two, *_) = (
        training_peaks("x", training_config(False), model, teacher, sharded, 4096, True)
        for teacher in (None, (model, 4))
    )
    head, hidden = model.vocab * model.hidden, 4096 * model.hidden
    alone = head * 4 + hidden * (4 + 2 * 2) + 2048 * model.vocab * (4 + 2)
    assert with_one.parts["loss head"] == alone
    assert with_two.parts["loss head"] == alone + hidden * 2 + 2048 * model.vocab * 4


def test_sharding_divides_what_is_kept_and_accumulation_keeps_gradients_whole() -> None:
    """FSDP reduces gradients once a step; before its last micro batch they are whole on every rank."""
    model = Architecture.of(tiny("qwen3"))
    size, at = 4 * model.num_parameters, Machine(True, 4, 4, 2)
    (*_, once, update) = training_peaks("x", training_config(True), model, (model, 2), at, 64, False)
    shares = {"weights": size // 4, "gradients": size // 4, "optimizer": size // 2, "teacher": size // 8}
    assert {part: once.parts[part] for part in shares} == shares
    assert update.parts["gradients"] == size // 4
    (*_, several, update) = training_peaks("x", training_config(True), model, (model, 2), at, 64, True)
    assert several.parts["gradients"] == size and update.parts["gradients"] == size // 4
    config = training_config(True)
    config["model"]["init_args"]["reduce_every_micro_batch"] = True
    (*_, reduced, _) = training_peaks("x", config, model, (model, 2), at, 64, True)
    assert reduced.parts == once.parts


def test_tensor_parallelism_cuts_layers_and_leaves_the_root_whole() -> None:
    model = Architecture.of(tiny("qwen3", tie_word_embeddings=False))
    plain, cut = (Machine(True, 4, 4, 2, size) for size in (1, 2))
    (loss, backward, _), (cut_loss, cut_backward, _) = (
        training_peaks("x", training_config(False), model, None, at, 4096, True) for at in (plain, cut)
    )
    assert cut_loss.parts["weights"] == loss.parts["weights"]
    layers, root = model.num_layers * model.num_layer_parameters, model.num_root_parameters
    assert backward.parts["gradients"] == 4 * (layers + root)
    assert cut_backward.parts["gradients"] == 4 * (layers // 2 + root)
    h, inner, qk = model.hidden, model.intermediate, model.queries + model.keys
    assert loss.parts["activations"] == 4096 * 4 * (26 * h + 8 * inner + 10 * qk)
    assert cut_loss.parts["activations"] == 4096 * 4 * (26 * h + 4 * inner + 5 * qk)
    assert cut_loss.parts["loss head"] == loss.parts["loss head"]


@pytest.mark.parametrize(
    ("strategy", "devices", "expected"),
    [
        ("auto", 1, (1, 1)),
        ({"class_path": "sdzero.trainer.FullShard"}, "auto", (8, 8)),
        (
            {"class_path": "sdzero.trainer.FullShard", "init_args": {"tensor_parallel_size": 4}},
            "auto",
            (8, 8),
        ),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, 2, (2, 2)),
        ({"class_path": "x.ModelParallelStrategy", "init_args": {"data_parallel_size": 4}}, 4, (4, 4)),
        ({"class_path": "x.ModelParallelStrategy", "init_args": {"data_parallel_size": "auto"}}, 4, (4, 1)),
    ],
)
def test_over_how_many_gpus_a_model_is_sharded(strategy: Any, devices: Any, expected: tuple[int, int]) -> None:
    values = {"accelerator": "gpu", "num_nodes": 1, "precision": "bf16-mixed"}
    at = machine({"trainer": {**values, "strategy": strategy, "devices": devices}}, num_gpus=8)
    assert (at.world_size, at.num_shards) == expected and at.compute_bytes == 2 and at.on_gpu
    assert at.tensor_parallel == (4 if "tensor_parallel_size" in str(strategy) else 1)


def test_fsdp_on_one_gpu_gathers_layer_by_layer_what_lies_in_host_memory() -> None:
    model, config = Architecture.of(tiny("qwen3")), training_config(True)
    config["model"]["init_args"]["student"]["cpu_offload"] = True
    one, many = (
        training_peaks("x", config, model, (model, 2), Machine(True, n, n, 2, wrapped=True), 64, False) for n in (1, 8)
    )
    assert [peak.parts for peak in one] == [peak.parts for peak in many]


@pytest.mark.parametrize(("devices", "num_nodes", "expected"), [(1, 1, 1), ("auto", 1, 8), (4, 2, 8)])
def test_collection_names_its_own_devices_and_shards_nothing(devices: Any, num_nodes: int, expected: int) -> None:
    at = machine({"devices": devices, "num_nodes": num_nodes}, num_gpus=8)
    assert at == Machine(True, expected, 1, 4)
    on_cpu = machine({"devices": devices, "num_nodes": num_nodes}, num_gpus=None)
    assert (on_cpu.on_gpu, on_cpu.world_size) == (False, 1 if devices == "auto" else expected)


# --- what is refused ------------------------------------------------------------------------------


def put(configs: Configs, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = configs
    for part in path:
        node = node[part]
    node[last] = value


@pytest.mark.parametrize("recipe", ["qwen3-4b-math", "olmo3-7b-math", "qwen2.5-7b-countdown"])
def test_the_papers_recipes_fit_their_gpus(paper: Configs, recipe: str) -> None:
    loaded = load_recipe(RECIPES / recipe)
    plan = estimate(loaded, paper if recipe == QWEN_MATH.name else parsed(loaded))
    assert plan.memory.refusals == []
    trained = {peak.stage for peak in plan.memory.peaks if peak.name == "backward"}
    assert trained == {"srt", "self_distill"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("srt.trainer.strategy", "auto", r"srt\.yaml: training of srt needs .*: shard .* trainer\.strategy"),
        ("srt.trainer.devices", 8, r"srt\.yaml: trainer\.devices asks for 8 GPUs; num_gpus of dry_run\.yaml is 4"),
        (
            "srt.model.init_args.student.gradient_checkpointing",
            False,
            r"srt\.yaml: training .*: set model\.student\.gradient_checkpointing: true",
        ),
        (
            "self_distill.trainer.strategy.init_args",
            {"tensor_parallel_size": 3},
            r"self_distill\.yaml: trainer\.strategy\.tensor_parallel_size 3 does not divide the number of processes, 4",
        ),
        (
            "self_distill.model.init_args.max_tokens_per_micro_batch",
            200_000,
            r"self_distill\.yaml: .*: lower model\.max_tokens_per_micro_batch; the longest example has 17,408 tokens",
        ),
        (
            "self_distill.data.init_args.engine.init_args.gpu_memory_utilization",
            0.9,
            r"self_distill\.yaml: sampling of .*: lower engine\.gpu_memory_utilization",
        ),
        (
            "srt.data.init_args.engine.init_args.gpu_memory_utilization",
            0.13,
            r"srt\.yaml: engine\.gpu_memory_utilization leaves .* raise engine\.gpu_memory_utilization",
        ),
        (
            "collect.engine.init_args.tensor_parallel_size",
            3,
            r"collect\.yaml: engine\.tensor_parallel_size 3 does not divide the number of processes, 4",
        ),
        ("collect.devices", 8, r"collect\.yaml: devices asks for 8 GPUs; num_gpus of dry_run\.yaml is 4"),
        (
            "collect.sampling.max_new_tokens",
            140_000,
            r"collect\.yaml: sampling\.max_new_tokens: an answer with its revision needs 281,024 tokens",
        ),
        (
            "self_distill.data.init_args.sampling.max_new_tokens",
            131_000,
            r"self_distill\.yaml: data\.sampling\.max_new_tokens: what the teacher reads needs 263,024 tokens",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(changed: Configs, key: str, value: Any, said: str) -> None:
    put(changed, key, value)
    refusals = estimate(QWEN_MATH, changed).memory.refusals
    assert refusals and any(re.search(said, line) for line in refusals), refusals


def test_a_bfloat16_teacher_halves_its_share(changed: Configs) -> None:
    settings = changed["self_distill"]["model"]["init_args"]["student"]

    def teacher() -> int:
        moments = estimate(QWEN_MATH, changed).memory.peaks
        return next(m.parts["teacher"] for m in moments if m.stage == "self_distill")

    before = teacher()
    put(changed, "self_distill.model.init_args.teacher", {**settings, "dtype": "bfloat16"})
    assert teacher() == before // 2 and before == 4_022_468_096


# --- the command ----------------------------------------------------------------------------------


def test_a_dry_run_reads_no_weights_asks_no_network_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a connection, or weights")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    overlay = tmp_path / "crowded"
    overlay.mkdir()
    (overlay / "eval.yaml").write_text("data: {init_args: {engine: {init_args: {gpu_memory_utilization: 0.95}}}}")
    empty = tmp_path / "empty"
    empty.mkdir()
    code = exit_code(monkeypatch, "run", QWEN_MATH.folder, "--dry-run", "--overlay", overlay, cwd=empty)
    said = capsys.readouterr().out
    assert "49,000 generations, ≤ 224.5M tokens sampled, ≤ 219.6M trained" in said and "≤ 352.8M" in said
    assert "sequences of mean length beside each other" in said and "backward" in said
    lines = str(code).splitlines()
    assert len(lines) == 3 and all(line.startswith("sdzero run: error: eval.yaml: sampling of ") for line in lines)
    assert list(empty.iterdir()) == []


def test_a_recipe_without_assumptions_or_a_model_at_hand_says_so(changed: Configs, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((QWEN_MATH.layers[0].folder / "recipe.yaml").read_text())
    bare = load_recipe(tmp_path)
    plan = estimate(bare, changed)
    assert not plan.memory.peaks
    assert any("no model folder at Qwen/Qwen3-4B-Instruct-2507" in note for note in plan.memory.notes)
    assert by_stage(plan)["collect"].tokens_sampled == 40_000 * 16_384
    assert by_stage(plan)["srt/eval"].generations is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean_tokens": 3}, "unknown key mean_tokens"),
        ({"num_gpus": 0}, "num_gpus must be a number above 0, got 0"),
        ({"num_gpus": None}, "num_gpus must be a number above 0, got None"),
        ({"model": {"model_type": "qwen3"}}, "model.hidden_size is missing"),
    ],
)
def test_a_wrong_assumption_is_refused_by_its_key(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "recipe.yaml").write_text("stages: {base: {trains: false}}")
    recipe, file = load_recipe(tmp_path), tmp_path / ASSUMPTIONS
    values = dict[str, Any](ChainMap(*(yaml.safe_load((x.folder / ASSUMPTIONS).read_text()) for x in QWEN_MATH.layers)))
    file.write_text(yaml.safe_dump({**values, **change}))
    with pytest.raises(ValueError, match=said):
        load_assumptions(recipe)
    del values["gpu_memory_gib"]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="gpu_memory_gib is missing"):
        load_assumptions(recipe)


def test_an_unknown_kind_of_model_is_named() -> None:
    assumptions = load_assumptions(QWEN_MATH)
    assert assumptions
    assumptions.model["model_type"] = "qwen33"
    with pytest.raises(ValueError, match="model.model_type 'qwen33' is not one of transformers'"):
        load_architecture("some/hub-id", assumptions)
