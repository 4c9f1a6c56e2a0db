# One line a target. CI calls these and nothing else.
PY ?= python3.11
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm setup-agents setup-ray browser sandbox postgres demo demo-vllm test test-fast test-vllm test-ray test-ray-llm test-kills test-comfyui test-gpu check bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.ready: pyproject.toml requirements.lock
	$(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

setup: .venv/.ready ## make .venv with SwarmX and what its tests need

setup-vllm: ## make .venv-vllm and fetch the small real model (several GB, once)
	scripts/setup_vllm.sh

setup-agents: .venv-agents/.ready ## make .venv-agents with the OpenAI Agents SDK, for the test of its page

# Its own environment: it and what the tests need do not go together.
.venv-agents/.ready:
	$(PY) -m venv .venv-agents
	.venv-agents/bin/python -m pip install --quiet --disable-pip-version-check 'openai-agents>=0.24,<0.25'
	@touch $@

setup-ray: .venv-ray/.ready ## make .venv-ray with Ray Serve and SwarmX, for docs/ray.md and its tests

.venv-ray/.ready: pyproject.toml
	$(PY) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -e '.[ray]' 'polars>=2.1,<3' \
	  'hypothesis>=6.170,<7' 'pytest>=9.2,<10' 'pytest-asyncio>=1.5,<2' 'pytest-timeout>=2.4,<3'
	@touch $@

# Ray Serve LLM asks for another vLLM than ours, and works with it: an environment that sees the packages of both. The
# ingress of Ray 2.60 takes `self` for a query parameter under FastAPI 0.137 and later.
.venv-ray-llm/.ready: .venv-ray/.ready
	$(PY) -m venv .venv-ray-llm
	ls -d $(CURDIR)/.venv-vllm/lib/*/site-packages $(CURDIR)/.venv-ray/lib/*/site-packages \
	  > $$(ls -d .venv-ray-llm/lib/*/site-packages)/both.pth
	.venv-ray-llm/bin/python -m pip install --quiet --disable-pip-version-check pyarrow fsspec jsonref \
	  'fastapi>=0.133,<0.137'
	@touch $@

browser:
	@command -v chromium >/dev/null || apt-get install -y -qq chromium >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
	  echo "There is no chromium and it cannot be installed here: the tests of the web page are skipped."

sandbox:
	@command -v bwrap >/dev/null || apt-get install -y -qq bubblewrap >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq bubblewrap; } >/dev/null 2>&1 || \
	  echo "There is no bubblewrap and it cannot be installed here: tools that are programs are refused, their tests skipped."

postgres:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || \
	  apt-get install -y -qq postgresql >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq postgresql; } >/dev/null 2>&1 || \
	  echo "There is no PostgreSQL server and it cannot be installed here: the tests of that store are skipped."

demo: setup ## the main job: agentic workflows over an emulated fleet (under 4 minutes)
	$(BIN)/swarmx demo

demo-vllm: setup ## the same on two real vLLM servers on this CPU (after make setup-vllm)
	$(BIN)/swarmx demo --engine vllm

test: setup browser sandbox postgres ## all tests but those that need vLLM, and the checks
	$(BIN)/python -m pytest -n 2 -m 'not vllm'
	$(MAKE) check

test-fast: setup ## tests without processes and sockets
	$(BIN)/python -m pytest -n 2 -m 'not vllm and not process'

test-vllm: setup setup-vllm ## tests against a real vLLM on the CPU (about ten minutes)
	$(BIN)/python -m pytest -m vllm tests/vllm

test-kills: setup ## kill gateways and runners at hundreds of moments, and tell what is left (about ten minutes)
	$(BIN)/python -m eval durable kills --lives 500
	$(BIN)/python -m eval durable kills --gateway --lives 400

test-comfyui: setup ## the ComfyUI front over real servers: COMFYUI_DIR=checkout COMFYUI_PYTHON=its interpreter
	COMFYUI_DIR=$(COMFYUI_DIR) COMFYUI_PYTHON=$(COMFYUI_PYTHON) $(BIN)/python -m pytest -n0 -m comfyui tests/compat/comfyui/real

test-gpu: setup ## vLLM servers that share a GPU of this host: SWARMX_GPU_VLLM=its program SWARMX_GPU_MODEL=a model's folder
	SWARMX_GPU_VLLM=$(SWARMX_GPU_VLLM) SWARMX_GPU_MODEL=$(SWARMX_GPU_MODEL) \
	  $(BIN)/python -m pytest -s -n0 -m gpu --confcutdir=tests/providers/gpu tests/providers/gpu

test-ray: setup-ray ## tests inside a real Ray Serve, and with replicas on three nodes of Ray (about ten minutes)
	.venv-ray/bin/python -m pytest --confcutdir=tests/compat/ray_serve tests/compat/ray_serve
	.venv-ray/bin/python -m pytest -m 'not vllm' --confcutdir=tests/providers/ray tests/providers/ray

test-ray-llm: setup-ray setup-vllm .venv-ray-llm/.ready ## the router inside a Ray Serve LLM app, and vLLM placed by Ray (about five minutes)
	.venv-ray-llm/bin/python -m pytest --confcutdir=tests/compat/ray_serve tests/compat/ray_serve/test_llm_app.py
	.venv-ray/bin/python -m pytest -m vllm --confcutdir=tests/providers/ray tests/providers/ray

check: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## what eval/LOG.md reports: decision time, gateway overhead, start-up
	$(BIN)/python -m eval.decision --out out/decision
	$(BIN)/python -m eval.overhead --out out/overhead
	$(BIN)/python -m eval.emulator check --out out/emulator
	$(BIN)/python -m eval.audit --out out/audit
	$(BIN)/python -m eval.control --out out/control
	$(BIN)/python -m eval.flashcrowd --out out/flashcrowd

docs: setup ## write the generated pages (settings, messages, policies, CLI)
	$(BIN)/python -m swarmx.docs docs/reference

clean: ## remove what the targets made, but for models
	rm -rf .venv .venv-vllm .venv-agents .venv-ray .venv-ray-llm out build dist .pytest_cache .mypy_cache .ruff_cache
