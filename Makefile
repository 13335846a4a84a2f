# Pagoda: `make run` shows it, `make test` proves it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MODEL  ?= deploy/demo/model
PROMPT ?= def read_lines(path):
PROFILE ?= cpu
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
SANITIZED := long_sequences or rotation or copies or products
# Of compute-sanitizer: python's own children and what libraries try and do without are no errors of ours.
SANITIZER := compute-sanitizer --error-exitcode 1 --target-processes application-only --report-api-errors no
PROTOS := $(wildcard protos/pagoda/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help setup run up test test-all test-docker wheels up-docker down-docker proto lint types bench-step bench-redis bench-worker bench-engines bench-memory bench-swap bench-load bench-streams bench-overload bench-peers soak plots kernels bench-kernels bench-cuda bench-gpu-worker count-cuda test-gpu kernels-variants mutate-kernels clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything in it
$(STAMP): pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing the development set into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools==84.2.1
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

run: setup ## Start everything, stream one generation of the demo model, end
	@$(BIN)/pagoda run --model $(MODEL) --prompt '$(PROMPT)'

up: setup ## Start everything and leave it running (Ctrl-C ends it)
	@$(BIN)/pagoda up --model $(MODEL)

test: setup ## Run the tests
	@$(BIN)/python -m pytest -m 'not slow and not docker'

test-all: setup ## Run the tests with the full products and the long state machines
	@PAGODA_TEST_LONG=1 $(BIN)/python -m pytest -m 'not docker'

test-docker: setup ## Build the images, bring the CPU profile up, kill a worker's container (needs an engine)
	@$(BIN)/python -m pytest -m docker -v

wheels: setup ## Download what the images need into deploy/docker/wheels, for builds without a network
	@$(BIN)/python -m pip download --quiet --dest deploy/docker/wheels setuptools==84.2.1 wheel async-timeout torch==2.13.0 '.[scheduler,worker]'

up-docker: ## Build and start the CPU profile; settings in deploy/.env
	@cd deploy && $(COMPOSE) --profile $(PROFILE) up --build --detach

down-docker: ## Stop it; Redis's data stays
	@cd deploy && $(COMPOSE) --profile $(PROFILE) down

proto: setup ## Generate the Python of the contract
	@PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos \
	    --mypy_out=protos --mypy_grpc_out=protos $(PROTOS)

lint: setup ## ruff, and buf where npm has it
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@.ci/buf

types: setup ## mypy, strict
	@$(BIN)/mypy

kernels: setup ## Compile the CPU kernels ahead, for every instruction set
	@$(BIN)/python -m kernels.cpu

bench-kernels: setup ## CPU kernels against a streaming read of memory and against torch
	@OMP_WAIT_POLICY=passive $(BIN)/python -m kernels.cpu.bench $(if $(JSON),--json $(JSON))

bench-step: setup ## Gap between steps, scheduler CPU, Redis and gRPC time, with timed steps
	@$(BIN)/python -m tests.load.bench_step

bench-redis: setup ## Bytes per block and time per script: one worker, 100, 4 GiB of them, a cluster of three nodes
	@$(BIN)/python -m tests.load.bench_redis

bench-worker: setup ## Where a CPU worker's step goes: products, attention, sampling, all else
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.load.bench_worker

bench-engines: setup ## Whole generations; PEERS='--peer openvino=PYTHON --peer vllm=PYTHON' runs other engines beside
	@$(BIN)/python -m tests.load.bench_engines $(PEERS) $(if $(JSON),--json $(JSON))

bench-memory: setup ## KV memory wasted, and throughput, paged beside dense in the same memory; writes JSON
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.load.bench_memory --json $(or $(JSON),build/memory.json)

bench-swap: setup ## An eighth of the KV memory that a batch needs: swapped, recomputed, or what is cheaper
	@$(BIN)/python -m tests.load.bench_swap $(if $(JSON),--json $(JSON))

bench-load: setup ## pagoda load on the demo model, rate upon rate, to the knee; writes JSON and a page
	@$(BIN)/python -m tests.load.bench_load --json $(or $(JSON),build/load.json)

bench-streams: setup ## Tokens per second that one scheduler sustains to streaming clients, and their delay
	@$(BIN)/python -m tests.load.bench_streams $(if $(JSON),--json $(JSON))

bench-overload: setup ## Ten times the knee, with timed workers: who is served, and what the others are told
	@$(BIN)/python -m tests.load.bench_overload $(if $(JSON),--json $(JSON))

bench-peers: setup ## OpenAI servers under the same arrivals as ours: PEERS='--peer vllm=PYTHON --peer llama.cpp=SOURCE'
	@$(BIN)/python -m tests.load.bench_peers $(PEERS) $(if $(JSON),--json $(JSON))

soak: setup ## 500 streams on the demo model for ten minutes, some cancelled, some left
	@$(BIN)/python -m tests.load.soak $(if $(JSON),--json $(JSON))

plots: setup ## The pictures in docs/, from the figures in docs/results (or JSON=...)
	@$(BIN)/python -m tests.load.memory.plots $(or $(JSON),docs/results/memory-sapphire-rapids.json)

bench-cuda: setup ## CUDA kernels against a copy of memory, FlashInfer where it is installed, and torch (needs a GPU)
	@$(BIN)/python -m kernels.cuda.bench $(if $(JSON),--json $(JSON))

bench-gpu-worker: setup ## A GPU worker's decode step beside what reading weights and KV takes (needs a GPU)
	@$(BIN)/python -m tests.load.bench_gpu_worker $(if $(JSON),--json $(JSON))

count-cuda: setup ## Instructions a tile in the CUDA kernels' hot loops, from their machine code (needs nvcc, cuobjdump)
	@$(BIN)/python -m kernels.cuda.hot_loops

test-gpu: setup ## Tests that need a GPU, some of them again under compute-sanitizer, where there is one
	@$(BIN)/python -m pytest -m gpu
	@for tool in $$(command -v compute-sanitizer >/dev/null && echo memcheck racecheck); do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool \
	        $(BIN)/python -m pytest --timeout 0 -m gpu -k '$(SANITIZED)' tests/kernels/cuda/test_gpu.py || exit 1; done

kernels-variants: setup ## Compile every CUDA variant with nvcc; goes on where it stopped
	@$(BIN)/python -m tests.kernels.cuda.compile_variants

mutate-kernels: setup ## Seed bugs into the CUDA kernels and count those that the tests catch (a quarter of an hour)
	@$(BIN)/python -m tests.kernels.cuda.mutate

clean: ## Remove what setup and the tools made
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis build
