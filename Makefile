# `make demo` and `make test` work on a fresh machine with Python >= 3.10: each makes .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow models bench clean

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/patchkit apply examples/facts.jsonl --method alphaedit --out out/demo-patch

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

models: .venv/ready
	$(BIN)/python examples/fetch_models.py all --out models

test-slow: models
	$(BIN)/pytest -m slow

clean:
	rm -rf .venv out models
