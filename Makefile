# On a machine with Python 3.11 and make: `make demo`, `make test`, `make docs`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
LEANING := closed_form config copositive cross_checks data enumerate estimator export folder network notebook odd_data \
	pretrained reading_images report sources

.PHONY: demo test test-slow test-lowest test-wheel lint docs clean

demo: $(VENV)/installed
	$(BIN)/convcvx train --data digits --preset demo --out checkpoints/demo --overwrite

# Most of these wait for processes that they start: two at a time take half as long.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

# The lowest versions that pyproject.toml allows, in an environment of their own: the tests that lean on them most.
test-lowest: $(LOWEST)/installed
	NUMBA_CACHE_DIR="$(CURDIR)/$(LOWEST)/numba" $(LOWEST)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" \
		$(LEANING:%=tests/test_%.py)

# What is published, alone in an empty environment.
test-wheel: $(VENV)/installed-dev
	PYTHON=$(PYTHON) .ci/wheel $(BIN)/python

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/site: warnings are errors, links are followed, every tutorial is run.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes in first: with it present, no other package asks for a build of its own.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): minutes, most of them torch's"
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@$(BIN)/python -c "import torchvision" 2> /dev/null || \
		echo "torchvision is not built for this torch: docs/machines.md says what that means for your own code"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

$(LOWEST)/installed: pyproject.toml constraints.txt .ci/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
