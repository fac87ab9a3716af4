# All tasks; `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo check test test-slow test-cluster test-all screenshots lint format bench clean

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with the versions of constraints.txt

$(READY): constraints.txt pyproject.toml
	@command -v $(PYTHON) > /dev/null || { \
		echo "error: $(PYTHON) is not installed (set PYTHON to a Python 3.11, 3.12 or 3.13)"; exit 1; }
	@echo "setting up $(VENV): a download of about 3 GB, 7 GB on the disk"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>&1 \
		| { grep -v '^WARNING: Location' || true; }
	@$(BIN)/python -c "import deit_ray, mlflow, optuna, ray, timm, torch"
	@touch $(READY)

demo: $(READY)  ## digits: prepare, train a teacher, search for the best distilled student
	@$(BIN)/deit-ray data prepare digits --out data/digits
	@$(BIN)/deit-ray train experiments/digits_teacher.yaml
	@$(BIN)/deit-ray tune experiments/digits_search.yaml

# tests/conftest.py describes the marks
check: lint  ## lint, and the tests that need neither Ray nor a server (2 minutes)
	@$(BIN)/python -m pytest -m "not cluster and not server and not hosts"

test: $(READY)  ## all tests but the slow ones: every promise and every command (8 minutes)
	@$(BIN)/python -m pytest -m "not slow and not hosts" --every-command --durations=15

test-slow: $(READY)  ## the slow tests
	@$(BIN)/python -m pytest -m "slow and not hosts" --durations=15

test-cluster: $(READY)  ## `ray up` and a study on hosts that are made on this machine (root; 12 minutes)
	@tests/support/alone.sh $(BIN)/python -m pytest -m hosts --durations=15

test-all: $(READY)  ## every test but those of test-cluster (30 minutes)
	@$(BIN)/python -m pytest -m "not hosts" --every-command --durations=15

screenshots: $(READY)  ## take the pictures of docs/ again: a study of the digits in Chromium (4 minutes)
	@$(BIN)/python -m pytest tests/test_pages.py --screenshots docs

lint: $(READY)  ## ruff's rules and format, and the layers (imports point down only)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo --no-cache

format: $(READY)  ## fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)  ## overhead of a trial, compared with Ray's documented pattern
	@$(BIN)/python bench/trial_overhead.py

clean:  ## remove .venv, prepared data and results
	rm -rf $(VENV) data results
