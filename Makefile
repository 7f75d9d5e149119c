# make train and make test set up what they need. Override PYTHON to choose the interpreter, and TORCH to choose the
# PyTorch to install, for example: make setup TORCH="torch==2.11.* torchvision"
PYTHON ?= python3
TORCH ?= torch torchvision
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup train eval test lint mutants bench
setup: $(READY)

# The operator is compiled against the PyTorch installed above, so the build is not isolated.
$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip setuptools
	$(RUN) -m pip install -q $(TORCH)
	$(RUN) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

train: $(READY)
	$(RUN) train.py $(ARGS)

eval: $(READY)
	$(RUN) eval.py protocol=two_clip $(ARGS)

# One thread per process; there is one process more than cores (tests/conftest.py).
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Takes hours; ARGS="rubiks.data.views*" runs a part. pyproject.toml names the files, docs/mutants.md the survivors.
mutants: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1 mutmut run $(ARGS)
	$(VENV)/bin/mutmut results

bench: $(READY)
	$(RUN) benchmarks/network.py $(ARGS)
