# Two commands on a fresh clone: `make demo` runs the main job, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types clean

# The stamp is newer than both files exactly when nothing has to be installed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,worst-cases]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/ddg demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Two processes: more would compete for two cores with the processes that tests start themselves.
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15

clean:
	rm -rf $(VENV) build dist *.egg-info ddg-demo
