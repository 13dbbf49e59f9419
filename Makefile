# `make demo` and `make test` set everything up by themselves; KVSCULPT_CACHE moves the
# models out of .cache. See `make help`.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# Prints the folder that has the Python of the vLLM that is supported and has no CPU build; fetches it first (12 MB).
NEXT_VLLM := $(BIN)/python tests/helpers/vllm_sources.py
BESIDE := tests/serving tests/engine/test_zoo.py tests/engine/test_windows.py tests/test_precompute.py
ON_NEXT := tests/engine tests/test_plugin.py tests/test_doctor.py
ENGINES_ON_NEXT := tests/engine/test_engine.py::test_a_prompt_longer_than_the_memory_is_served_and_gives_the_tokens_of_stock_vllm \
  "tests/engine/test_windows.py::test_every_entry_in_shuffled_packed_pages_gives_the_tokens_of_stock_vllm[V2]" \
  tests/serving/test_http.py::test_a_chat_request_is_sculpted_and_answers_from_the_document
MODEL_NAME := smollm2-135m

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Make .venv with the CPU build of vLLM, and the embedded model
	@$(BIN)/kvsculpt model $(MODEL_NAME) > /dev/null

demo: setup ## Serve the embedded model and compare an exact with a sculpted answer
	@$(BIN)/python -m kvsculpt_vllm.demo

test: setup ## Run all tests
	@# Servers compute on the first core, the engines of the other tests on the last one: side by side they take half of the
	@# time. Behind the servers come tests on vLLM 0.33's Python and 0.32's kernels, without those of the solver.
	@{ export KVSCULPT_TEST_CORE=first; $(BIN)/python -m pytest -q $(BESIDE); serving=$$?; \
	    export KVSCULPT_TEST_EXAMPLES=120; \
	    next=$$($(NEXT_VLLM)) && PYTHONPATH=$$next $(BIN)/python -m pytest -q -m "not engine" -k "not a_solve_" $(ON_NEXT) && \
	    PYTHONPATH=$$next $(BIN)/python -m pytest -q $(ENGINES_ON_NEXT) && exit $$serving; \
	  } > $(VENV)/test-serving.log 2>&1 & serving=$$!; \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels; kernels=$$?; \
	  $(BIN)/python -m pytest -q $(addprefix --ignore=,tests/kernels $(BESIDE)); others=$$?; \
	  wait $$serving; serving=$$?; cat $(VENV)/test-serving.log; exit $$((serving || kernels || others))

# `.venv/bin/pre-commit install` has git run it before every commit.
lint: $(VENV)/.installed ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@# Types on both vLLMs, side by side: each takes a minute and a half of one core where nothing is cached.
	@$(BIN)/mypy & own=$$!; next=$$($(NEXT_VLLM)) && MYPYPATH=$$next $(BIN)/mypy --cache-dir .mypy_cache/next; other=$$?; \
	  wait $$own; own=$$?; exit $$((own || other))

docs: $(VENV)/.installed ## Write the tables of README.md and docs/ anew
	@cd docs && ../$(BIN)/python -m tables

$(VENV)/.vllm: .ci/setup-cpu
	@.ci/setup-cpu $(PYTHON) $(VENV)
	@touch $@

# The extra `cpu` is left out: .ci/setup-cpu has installed vLLM, and pip would add torchvision and its like again.
$(VENV)/.installed: $(VENV)/.vllm setup.py pyproject.toml Makefile
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' || { \
	  echo "setup: FAILED: cannot install this package: see pip's error above; check the network, then run 'make setup' again" >&2; \
	  exit 1; }
	@touch $@
