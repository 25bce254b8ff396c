# `make demo` and `make test` do all the set-up themselves: a .venv with pip, under the tested versions.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= logical
# A file at a time, in order: what its tests share is made once.
SPREAD := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test long faults survey lint clean

help:
	@echo "make demo    the whole road on a small real model (93 MB fetched once): no GPU, some five minutes"
	@echo "make test    ruff, mypy, import-linter, then every test but the long ones"
	@echo "make long    what make test leaves out because it takes long"
	@echo "make faults  the long fault-injection suite, with its table of figures"
	@echo "make survey  every architecture built small and taken down the whole road, with its table: some five minutes"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make clean   remove .venv and what demo and the checkers left behind"

# torch goes first and alone, so that pip takes the build that this machine offers and then leaves it as it is.
.venv/torch-installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	@touch $@

.venv/qlora-installed: .venv/torch-installed pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/tests-installed: .venv/qlora-installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: .venv/qlora-installed
	$(BIN)/python examples/demo.py

lint: .venv/tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test long faults survey: export OMP_NUM_THREADS = 1
test long faults survey: export TOKENIZERS_PARALLELISM = false

# The checkers beside the tests, in the time that these leave; what they say comes last where they fail.
test: .venv/tests-installed
	@said=$$(mktemp); nice -n 7 $(MAKE) --no-print-directory lint >$$said 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -m "not slow" $(SPREAD); tests=$$?; \
	wait $$lint || { cat $$said; tests=1; }; rm $$said; exit $$tests

long: .venv/tests-installed
	$(BIN)/python -m pytest -m slow $(SPREAD) --ignore tests/faults/test_stock_trainer.py

faults: .venv/tests-installed
	$(BIN)/python -m pytest -m slow tests/faults -n $(WORKERS) --maxprocesses 32 --dist worksteal

survey: .venv/tests-installed
	$(BIN)/python benchmarks/survey.py --table benchmarks/models.md

clean:
	rm -rf .venv demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
