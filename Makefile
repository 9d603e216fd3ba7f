# Each target makes the virtual environment it needs, on a bare machine too, and is quick when it exists.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/
# bytecode is made of what is imported, not of all that is installed: half a minute less; containers often forbid it,
# and then every process of a test would compile torch anew, 5 s each
INSTALL = $(RUN)pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all clean

quickstart: $(VENV)/examples-installed
	$(RUN)python examples/quickstart.py

test: $(VENV)/dev-installed
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports
	OMP_NUM_THREADS=1 $(RUN)pytest -q -n auto -m "not long"

test-all: test
	OMP_NUM_THREADS=1 $(RUN)pytest -q -n auto -m long

$(VENV)/examples-installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) --editable ".[examples]"
	touch $@

$(VENV)/dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) --editable ".[dev]"
# without the torchvision that it asks for, which does not fit a CPU-only torch: the tests bring a stand-in
	$(INSTALL) --no-deps "lpips>=0.1.4"
	touch $@ $(VENV)/examples-installed

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) quickstart_output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
