# make test   everything the tests need, then the tests
# make demo   everything the package needs, then the demo; TEXT=file.txt trains it on another text
#
# PYTHON=python3.12        the interpreter the environment is made with (3.10 or newer)
# TORCH_INDEX=address      a package index that offers CPU builds of torch, for machines where the default build is CUDA's
# WORKERS=4                test processes
# DEMO="--steps 50"        more options for the demo

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2
TEXT ?=
DEMO ?=

# Those that need nothing but the package; benchmarks/README.md has the others, which read a model or a text of yours.
BENCHMARKS := training_step regime_control regime_recovery generation evaluation_memory evaluation_time attention_weights attention_step retrofit_cost quality

# laplace-torch and what it runs on, without its requirement of torchvision: it does not use it here, and the builds of
# torchvision that an index offers may be those of another torch.
LAPLACE := laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops linear-operator opt-einsum unfoldnd

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# One thread a process: two workers with two threads each on two cores fight over them and take longer.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help install test lint format demo bench wheel clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))
	@echo "targets: install test lint format demo bench wheel clean"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10 or missing: name another with make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(LAPLACE)
	@touch $@

install: $(STAMP)

test: $(STAMP)
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/hf-variational demo $(if $(TEXT),--text "$(TEXT)") $(DEMO)

bench: $(STAMP)
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python benchmarks/$$script.py; done

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
