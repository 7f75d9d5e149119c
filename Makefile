# make train and make test set up what they need. Override PYTHON to choose the interpreter, and TORCH to choose the
# PyTorch to install, for example: make setup TORCH="torch==2.11.* torchvision"
PYTHON ?= python3
TORCH ?= torch torchvision
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup train eval test lint bench
setup: $(READY)

# The operator is compiled against the PyTorch installed before, so not in an isolated build.
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

test: $(READY)
	$(RUN) -m pytest $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) benchmarks/network.py $(ARGS)
