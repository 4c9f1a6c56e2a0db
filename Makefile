# One line a target. CI calls these and nothing else.
PY ?= python3.11
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm browser sandbox demo demo-vllm test test-fast test-vllm check bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.ready: pyproject.toml requirements.lock
	$(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

setup: .venv/.ready ## make .venv with SwarmX and what its tests need

setup-vllm: ## make .venv-vllm and fetch the small real model (several GB, once)
	scripts/setup_vllm.sh

browser:
	@command -v chromium >/dev/null || apt-get install -y -qq chromium >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
	  echo "There is no chromium and it cannot be installed here: the tests of the web page are skipped."

sandbox:
	@command -v bwrap >/dev/null || apt-get install -y -qq bubblewrap >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq bubblewrap; } >/dev/null 2>&1 || \
	  echo "There is no bubblewrap and it cannot be installed here: tools that are programs are refused, their tests skipped."

demo: setup ## the main job: agentic workflows over an emulated fleet (under 4 minutes)
	$(BIN)/swarmx demo

demo-vllm: setup ## the same on two real vLLM servers on this CPU (after make setup-vllm)
	$(BIN)/swarmx demo --engine vllm

test: setup browser sandbox ## all tests but those that need vLLM, and the checks
	$(BIN)/python -m pytest -n 2 -m 'not vllm'
	$(MAKE) check

test-fast: setup ## tests without processes and sockets
	$(BIN)/python -m pytest -n 2 -m 'not vllm and not process'

test-vllm: setup setup-vllm ## tests against a real vLLM on the CPU (about ten minutes)
	$(BIN)/python -m pytest -m vllm tests/vllm

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
	rm -rf .venv .venv-vllm out build dist .pytest_cache .mypy_cache .ruff_cache
