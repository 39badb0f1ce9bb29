# Every target makes the virtual environment it needs (see .ci/environment); PYTHON=... picks another interpreter.
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow test-real notebooks lint fmt types docs release-check bench clean

BIN := .venv/bin
SOURCES := headscope.py interp probes dashboards notebooks docs/hooks tests
# Options for the command that a target runs, as in: make demo DEMO_ARGS="--no-browser --port 8060"
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
NOTEBOOK_ARGS ?= --check

# pytest's 5 is "no test matched", which a chosen `-k` makes normal.
define pytest
$(BIN)/python -m pytest $(1) $(PYTEST_ARGS) || [ $$? -eq 5 ]
endef

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/.stamp-demo: pyproject.toml constraints.txt interp/_version.py
	@.ci/environment dashboard,gemma
	@touch $@

.venv/.stamp-dev: pyproject.toml constraints.txt interp/_version.py
	@.ci/environment dashboard,gemma,analysis,notebooks,dev
	@touch $@ .venv/.stamp-demo

.venv/.stamp-docs: pyproject.toml constraints.txt interp/_version.py
	@.ci/environment dashboard,gemma,dev,docs
	@touch $@ .venv/.stamp-demo .venv/.stamp-dev

demo: .venv/.stamp-demo ## the main job on a real model, and its dashboard
	$(BIN)/headscope demo $(DEMO_ARGS)

test: .venv/.stamp-dev ## the fast suite, then the tests on real weights
	$(call pytest,-n auto -m "not real and not slow")
	$(call pytest,-m "real and not slow")

test-fast: .venv/.stamp-dev ## the fast suite, in parallel
	$(call pytest,-n auto -m "not real and not slow")

test-slow: .venv/.stamp-dev ## the tests that take over ten seconds: trainings, whole trips, compilers
	$(call pytest,-n auto -m slow)

test-real: .venv/.stamp-dev ## the tests on real weights
	$(call pytest,-m real)

notebooks: .venv/.stamp-dev ## run every notebook; nothing is written
	$(BIN)/python notebooks/_build.py --check $(NOTEBOOK_ARGS)

lint: .venv/.stamp-dev ## ruff: rules and format
	$(BIN)/ruff check --output-format concise $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

fmt: .venv/.stamp-dev ## format, and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

types: .venv/.stamp-dev ## pyright, strict on interp/
	$(BIN)/pyright --project pyproject.toml

docs: .venv/.stamp-docs ## the documentation in out/docs, warnings as errors
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict --quiet

release-check: .venv/.stamp-dev ## wheel and sdist, built, looked into, and installed into an empty environment
	HEADSCOPE_EMPTY_ENVIRONMENT=1 $(BIN)/python -m pytest tests/test_packaging.py tests/test_extras.py -m slow $(PYTEST_ARGS)

bench: .venv/.stamp-dev ## every benchmark, recorded in tests/benchmarks/results
	@for file in tests/benchmarks/bench_*.py; do echo "-- $$file"; $(BIN)/python $$file $(BENCH_ARGS) || exit 1; done

clean: ## remove .venv, caches and build products
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find interp probes dashboards tests -name __pycache__ -prune -exec rm -rf {} +
