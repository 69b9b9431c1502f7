"""The dry run's architecture and bytes against real models, and its rules for many GPUs by hand."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from sdzero.losses import Divergence, cross_entropy_head, divergence_head
from sdzero.losses.soft_targets import HiddenTargets
from sdzero.models.language_model import LanguageModel
from sdzero.models.lora import AdaptersOff, Lora, add_adapters, num_adapter_parameters
from sdzero.pipeline.dry_run.assumptions import Architecture, load_architecture, load_assumptions
from sdzero.pipeline.dry_run.memory import Machine, MemoryPeak, machine
from sdzero.pipeline.dry_run.sampling import BATCHED_TOKENS, cache_bytes
from sdzero.pipeline.dry_run.training import training_peaks
from sdzero.utils.recipe import load_recipe
from support.runs import ROOT

RECIPES = ROOT / "configs/recipes"
ONE_GPU = Machine(True, 1, 1, 4)
LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
TINY |= {"intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 512}
TINY |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def tiny(model_type: str = "qwen3", **overrides: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**TINY, **overrides})


@pytest.fixture(scope="module")
def model() -> Architecture:
    return Architecture(tiny())


def peaks(
    model: Architecture, teacher: int | None, at: Machine, num_tokens: int, accumulates: bool = True, **arguments: Any
) -> list[MemoryPeak]:
    """Memory peaks with a teacher of the student's size and `teacher` bytes per element, or without one."""
    student = {"cpu_offload": False, "gradient_checkpointing": False, **arguments.pop("student", {})}
    config = {"model": {"init_args": {"student": student, "optimizer": {"init_args": {}}, **arguments}}}
    of_teacher = None if teacher is None else (model, teacher)
    return training_peaks("x", config, model, of_teacher, at, num_tokens, accumulates)


# --- the architecture -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "olmo3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_those_of_a_real_model(model_type: str, tied: bool) -> None:
    config = tiny(model_type, tie_word_embeddings=tied)
    real, counted = AutoModelForCausalLM.from_config(config), Architecture(config)
    assert counted.num_parameters == sum(p.numel() for p in real.parameters())
    assert counted.num_layer_parameters == sum(p.numel() for p in real.model.layers[0].parameters())
    outside = [p.numel() for name, p in real.named_parameters() if ".layers." not in name]
    assert counted.num_root_parameters == sum(outside)


@pytest.mark.parametrize(
    ("recipe", "millions"), [("qwen3-4b-math", 4022), ("olmo3-7b-math", 7298), ("qwen2.5-7b-countdown", 7616)]
)
def test_sizes_of_the_papers_models_match_their_names(recipe: str, millions: int) -> None:
    assumptions = load_assumptions(load_recipe(RECIPES / recipe))
    model = load_architecture("some/hub-id", assumptions)
    assert model and round(model.num_parameters / 1e6) == millions
    assert (model.num_sliding_layers, model.window) == ((24, 4096) if "olmo" in recipe else (0, 0))
    local = load_architecture(str(ROOT / "configs/tiny_model"), assumptions)  # a model folder has priority
    assert local and local.num_parameters < 200_000


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"]])
def test_adapters_of_chosen_layers_are_counted(targets: list[str]) -> None:
    config = tiny(hidden_size=128, intermediate_size=512)
    hf, lora = AutoModelForCausalLM.from_config(config), {**LORA, "target_modules": targets}
    assert Architecture(config).num_trained({"lora": lora}) == num_adapter_parameters(hf, Lora(**lora))


@pytest.mark.parametrize("model_type", ["qwen3", "olmo3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_size_equals_real_keys_and_values(model_type: str, dtype: torch.dtype) -> None:
    config = tiny(model_type, sliding_window=128)
    real = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cache, counted = DynamicCache(config=config), Architecture(config)
    real(torch.zeros(1, 50, dtype=torch.long), past_key_values=cache)
    layers: list[Any] = cache.layers
    size = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    sizes = [cache_bytes(counted, 50, dtype.itemsize, num_gpus) for num_gpus in (1, 2, 4)]
    assert sizes == [size, size // 2, size // 2]  # two heads
    if model_type == "olmo3":  # three of four layers slide: they hold their window and one batch of vLLM's
        per_token = 2 * 2 * 32 * 2
        assert cache_bytes(counted, 100_000, 2) == per_token * (100_000 + 3 * (127 + BATCHED_TOKENS))


# --- real steps -----------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Peak bytes of tensors that were created inside it or passed to `show`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def show(self, tensors: Iterable[torch.Tensor]) -> None:
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


class Step:
    """Micro batches of a real model and AdamW, watched by `Live`; with `lora` adapters alone are trained."""

    def __init__(self, num_tokens: int, bf16: bool, with_teacher: bool, checkpointing: bool, lora: bool) -> None:
        config = tiny(hidden_size=128, num_hidden_layers=3, intermediate_size=512, tie_word_embeddings=True)
        self.sizes, self.bf16, self.num_tokens, self.with_teacher = Architecture(config), bf16, num_tokens, with_teacher
        models = (AutoModelForCausalLM.from_config(config, attn_implementation="sdpa") for _ in range(2))
        self.student, teacher = (LanguageModel(each).train() for each in models)
        self.teacher: Any = teacher.requires_grad_(False).eval()
        if checkpointing:
            options = {"use_reentrant": False}
            self.student.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if lora:
            if bf16:
                self.student.bfloat16()
            add_adapters(self.student.hf, Lora(**LORA))
            self.teacher = AdaptersOff(self.student)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained)
        self.live = Live()
        self.live.show([*self.student.parameters(), *(self.teacher.parameters() if with_teacher and not lora else ())])

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


@pytest.mark.parametrize(
    ("bf16", "with_teacher", "checkpointing", "lora"),
    [
        *product((True, False), (True, False), (True, False), (False,)),
        *product((True, False), (True,), (False,), (True,)),
    ],
)
def test_peak_of_a_real_step(bf16: bool, with_teacher: bool, checkpointing: bool, lora: bool) -> None:
    """The parts that a training keeps equal real tensors; the largest peak is near that of all live tensors, over
    weights small beside them."""
    step = Step(256, bf16, with_teacher, checkpointing, lora)
    step.run()
    at, bytes_of_teacher = Machine(False, 1, 1, 2 if bf16 else 4), 0 if lora else 4
    student: dict[str, Any] = {"gradient_checkpointing": checkpointing, "dtype": "float32"}
    if lora:
        student |= {"lora": LORA, "dtype": "bfloat16" if bf16 else "float32"}
    found = peaks(step.sizes, bytes_of_teacher if with_teacher else None, at, 256, student=student)
    assert 0.95 * step.live.peak <= max(peak.total for peak in found) <= 1.15 * step.live.peak
    _, backward, update = found
    moments = [step.optimizer.state[p][name] for p in step.trained for name in ("exp_avg", "exp_avg_sq")]
    kept = {"weights": step.student.parameters(), "gradients": [p.grad for p in step.trained], "optimizer": moments}
    kept["teacher"] = step.teacher.parameters() if with_teacher and not lora else []
    for name, tensors in kept.items():
        assert backward.parts[name] == sum(t.nbytes for t in tensors if t is not None), name
    assert update.parts["gradients"] == backward.parts["gradients"]
    assert update.parts["copies"] == 0  # torch's default on the CPU takes one weight after the other
    assert step.sizes.num_trained(student) == sum(p.numel() for p in step.trained)


# --- many GPUs, by hand ---------------------------------------------------------------------------


def test_only_the_head_of_an_offloaded_teacher_remains(model: Architecture) -> None:
    plain, *_ = peaks(model, 2, ONE_GPU, 64)
    first, *_ = peaks(model, 2, ONE_GPU, 64, teacher_first=True)
    assert plain.parts["teacher"] == 2 * model.num_parameters
    assert first.parts["teacher"] == ONE_GPU.compute_bytes * model.vocab * model.hidden < plain.parts["teacher"]
    assert peaks(model, 2, ONE_GPU, 64)[-1].parts["copies"] == plain.parts["weights"]  # AdamW over all weights at once


def test_loss_head_of_a_sharded_model_on_gpus(model: Architecture) -> None:
    """2,048 tokens of both models' float32 logits and a bfloat16 gradient; the heads are multiplied as gathered."""
    (with_one, *_), (with_two, *_) = (peaks(model, teacher, Machine(True, 8, 8, 2), 4096) for teacher in (None, 4))
    head, hidden = model.vocab * model.hidden, 4096 * model.hidden
    alone = head * 4 + hidden * (4 + 2 * 2) + 2048 * model.vocab * (4 + 2)
    assert with_one.parts["loss head"] == alone
    assert with_two.parts["loss head"] == alone + hidden * 2 + 2048 * model.vocab * 4


def test_sharding_divides_resident_memory_and_accumulation_keeps_gradients_whole(model: Architecture) -> None:
    """FSDP reduces gradients once a step; before its last micro batch they are whole on every rank."""
    size, at = 4 * model.num_parameters, Machine(True, 4, 4, 2)
    _, once, update = peaks(model, 2, at, 64, accumulates=False)
    shares = {"weights": size // 4, "gradients": size // 4, "optimizer": size // 2, "teacher": size // 8}
    assert {part: once.parts[part] for part in shares} == shares
    assert update.parts["gradients"] == size // 4
    _, several, update = peaks(model, 2, at, 64)
    assert several.parts["gradients"] == size and update.parts["gradients"] == size // 4
    assert peaks(model, 2, at, 64, reduce_every_micro_batch=True)[1].parts == once.parts


def test_tensor_parallelism_cuts_layers_and_leaves_the_root_whole() -> None:
    model = Architecture(tiny(tie_word_embeddings=False))
    (loss, backward, _), (cut_loss, cut_backward, _) = (
        peaks(model, None, Machine(True, 4, 4, 2, size), 4096) for size in (1, 2)
    )
    assert cut_loss.parts["weights"] == loss.parts["weights"]
    layers, root = model.num_layers * model.num_layer_parameters, model.num_root_parameters
    assert backward.parts["gradients"] == 4 * (layers + root)
    assert cut_backward.parts["gradients"] == 4 * (layers // 2 + root)
    h, inner, qk = model.hidden, model.intermediate, model.queries + model.keys
    assert loss.parts["activations"] == 4096 * 4 * (26 * h + 8 * inner + 10 * qk)
    assert cut_loss.parts["activations"] == 4096 * 4 * (26 * h + 4 * inner + 5 * qk)
    assert cut_loss.parts["loss head"] == loss.parts["loss head"]


def test_fsdp_on_one_gpu_gathers_layer_by_layer_from_host_memory(model: Architecture) -> None:
    student = {"cpu_offload": True, "gradient_checkpointing": True}
    one, many = (
        peaks(model, 2, Machine(True, n, n, 2, wrapped=True), 64, accumulates=False, student=student) for n in (1, 8)
    )
    assert [peak.parts for peak in one] == [peak.parts for peak in many]


@pytest.mark.parametrize(
    ("strategy", "options", "devices", "expected"),
    [
        ("auto", None, 1, (1, 1, 1)),
        ("sdzero.trainer.FullShard", {}, "auto", (8, 8, 1)),
        ("sdzero.trainer.FullShard", {"tensor_parallel_size": 4}, "auto", (8, 8, 4)),
        ("lightning.pytorch.strategies.FSDPStrategy", {}, 2, (2, 2, 1)),
        ("x.ModelParallelStrategy", {"data_parallel_size": 4}, 4, (4, 4, 1)),
        ("x.ModelParallelStrategy", {"data_parallel_size": "auto"}, 4, (4, 1, 1)),
    ],
)
def test_processes_and_shards_of_a_strategy(strategy: str, options: Any, devices: Any, expected: Any) -> None:
    given = strategy if options is None else {"class_path": strategy, "init_args": options}
    values = {"accelerator": "gpu", "num_nodes": 1, "precision": "bf16-mixed", "strategy": given, "devices": devices}
    at = machine({"trainer": values}, num_gpus=8)
    assert (at.world_size, at.num_shards, at.tensor_parallel) == expected and at.compute_bytes == 2 and at.on_gpu


@pytest.mark.parametrize(("devices", "num_nodes", "expected"), [(1, 1, 1), ("auto", 1, 8), (4, 2, 8)])
def test_a_collection_has_its_own_devices_and_shards_nothing(devices: Any, num_nodes: int, expected: int) -> None:
    config = {"devices": devices, "num_nodes": num_nodes}
    assert machine(config, num_gpus=8) == Machine(True, expected, 1, 4)
    on_cpu = machine(config, num_gpus=None)
    assert (on_cpu.on_gpu, on_cpu.world_size) == (False, 1 if devices == "auto" else expected)
