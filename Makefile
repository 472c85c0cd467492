# Every target makes .venv first when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint bench docs pages fuzz

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo/demo.sh

# A process for each core, with one thread each: that keeps all cores busy.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

# What commands write into the pages: the help of the commands, tables of results, drawings.
pages: $(STAMP)
	$(BIN)/python recipes/docs/commands.py
	$(BIN)/python recipes/docs/drawings.py
	$(BIN)/python recipes/bench/results.py

# A broken link, or a page that the navigation lacks, is an error (not with --quiet). Needs no network.
docs: pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/docs/index.html."

# Mutated checkpoints for SECONDS, then CASES mutated images, arrays and lists; prints the counts.
SECONDS ?= 600
CASES ?= 10000
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz $(SECONDS)
	$(BIN)/python tests/fuzz/data_cases.py --cases $(CASES)

bench: $(STAMP)
	$(BIN)/python recipes/bench/speed.py
	$(BIN)/python recipes/bench/evidence.py --limit 300 --keep 0.8 0.6
	$(BIN)/python recipes/bench/training.py

# torch goes first and alone: it is the one large wheel, and its version decides which build (CPU or CUDA) is taken.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
