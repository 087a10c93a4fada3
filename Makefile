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

# Two processes, as tests start some themselves. By file: then the faults of distributed runs, which
# have time limits, are not tried beside one another (xdist_group has no effect with pytest 9.2).
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

clean:
	rm -rf $(VENV) build dist *.egg-info ddg-demo
