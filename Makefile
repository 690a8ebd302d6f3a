# Everything a newcomer needs: `make demo`, then `make test`. Both set up what they need; a second run skips that.
# Needs Python 3.10 or newer with pip and venv; `make PYTHON=python3.12 test` names another interpreter.

PYTHON ?= python3
CORES := $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -ge 2 ] || n=2; echo $$n)
T5 := .venv-t5/bin/python
T4 := .venv-t4/bin/python
PYTEST := -m pytest -n $(CORES)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-t5 test-t4 test-matrix lint format bench clean env env-demo env-t5 env-t4 env-peers

help: ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: env-demo ## embed Python's language reference with a real model and ask it two questions
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(T5) examples/demo.py

test: test-t5 test-t4 ## run the tests with transformers 5, then with transformers 4 and flair

test-t5: env-t5
	$(T5) $(PYTEST) -m "not full"

test-t4: env-t4
	$(T4) $(PYTEST) -m "not full"

test-all: env-t5 env-t4 ## run every test, the long law suites too
	$(T5) $(PYTEST) --hypothesis-profile=full
	$(T4) $(PYTEST) --hypothesis-profile=full

test-matrix: env-t5 env-t4 ## run a short suite on each release of transformers; RELEASES="5.10.4 5.24.0+torch2.14.1" names others
	@$(PYTHON) requirements/matrix.py $(RELEASES)

lint: env-t5 ## check style, format and types
	$(T5) -m ruff check .
	$(T5) -m ruff format --check .
	$(T5) -m mypy

format: env-t5 ## bring the code into its format
	$(T5) -m ruff check --fix-only .
	$(T5) -m ruff format .

bench: env-t5 ## run the benchmarks at full size, one after the other (needs a quiet machine)
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(T5) "$$script"; done

env: env-t5 env-t4 ## make both environments and run nothing

env-demo:
	@$(PYTHON) requirements/make_env.py demo

env-t5:
	@$(PYTHON) requirements/make_env.py t5

env-t4:
	@$(PYTHON) requirements/make_env.py t4

env-peers: ## make the environment of nnsight and TransformerLens, for bench_capture alone
	@$(PYTHON) requirements/make_env.py peers

clean: ## delete the environments, caches and whatever the demo wrote
	rm -rf .venv-t5 .venv-t4 .venv-peers .venv-matrix-* .demo .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
