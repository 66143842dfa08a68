# One door for people and CI: `make demo` and `make test` need only Python, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all lint type bench docs

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[train,offline,demo,scale,openvino,export,index,station,postgres,dev]"
	touch $(READY)

demo: setup
	$(BIN)/anomalyst demo -o out/demo

test: setup
	$(BIN)/pytest

test-all: setup
	$(BIN)/pytest -m "not bench"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/mypy

bench: setup
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

docs: setup
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict
