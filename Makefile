# `make train`, `make test`: with nothing but Python >= 3.11, git and make.
# The first of these that runs and is new enough; `make PYTHON=...` names another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# What to train and how: `make train ARGS="--config=configs/copy.py --config.training.seed=1"`.
ARGS ?=

.PHONY: train test nightly lint lock notebooks clean

train: .venv/installed
	$(BIN)/python train.py $(ARGS)

# Stealing leaves most tests of a file to one worker, which then trains the file's models once.
test: .venv/installed lint
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Three times as many cases of value and gradient, over a thousand an implementation.
nightly: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal tests/functional --hypothesis-profile=nightly $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# A hash of every package is pinned, so what is installed is what was tested; the project itself is installed last.
.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: attn needs Python 3.11 or newer; name one: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# One universal file for Python 3.11 and newer, without the address of an index; needs `uv`.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --extra dev --output-file requirements.txt pyproject.toml

# Notebooks are kept as scripts; this writes the .ipynb beside each.
notebooks: .venv/installed
	$(BIN)/jupytext --update --to ipynb notebooks/*.py

clean:
	rm -rf .venv
