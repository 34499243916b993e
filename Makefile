# Everything happens in one virtual environment; `make help` lists the targets and their variables.
.DEFAULT_GOAL := help
.PHONY: help install demo test clean
.DELETE_ON_ERROR:

VENV ?= .venv
TORCH ?=
EXTRAS ?=
# Shims of version managers may exist and yet not run, hence a call rather than a search in PATH.
PY ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
  done)

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check install --quiet
# Not results/, whose tables are those of the committed studies; runs/ is ignored by git.
demo_results := runs/results
torch_lock := $(shell sed -n 's/^torch==//p' requirements.lock)

help:
	@echo "make demo    install, train four layers by two recipes on the digits (CPU, minutes), print the table, draw figures;"
	@echo "             tables and figures go to $(demo_results)"
	@echo "make test    install the development tools, run the tests"
	@echo "make install only install, into $(VENV)"
	@echo "make clean   remove $(VENV)"
	@echo
	@echo "Variables:"
	@echo "  PY=python3.12         interpreter, 3.11 or newer; found: $(PY)"
	@echo "  TORCH=torch==2.13.0   torch to install, as arguments of pip install; default: the torch that $(VENV) or PY has,"
	@echo "                        else the CPU build of $(torch_lock)"
	@echo "  VENV=.venv            where to install"
	@echo "  EXTRAS=interpret      what 'make test' installs besides: Triton, 700 MB, whose interpreter and compiler then test"
	@echo "                        the GPU kernels without a GPU; EXTRAS=interpret,adapt,export tests inside transformers"
	@echo "                        and ONNX as well"

$(python):
	@test -n "$(PY)" || { echo "no Python >= 3.11 with venv found; name one: make PY=/path/to/python" >&2; exit 1; }
	$(PY) -m venv $$($(PY) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)

# torch first and alone, then the rest of the lock around it, so that no later install swaps the build that was chosen.
# (torch pins its triton and, before 2.7, its sympy.)
# The CPU build has a version of its own where pip can see it; uv knows where PyTorch keeps it; elsewhere the registry's.
$(VENV)/constraints.txt: requirements.lock | $(python)
ifneq ($(TORCH),)
	$(pip) $(TORCH)
else
	@$(python) -c 'import torch' 2>/dev/null || { echo "installing the CPU build of torch $(torch_lock)"; \
	  $(pip) 'torch==$(torch_lock)+cpu' 2>/dev/null || \
	  { $(pip) uv && $(python) -m uv pip install -q --python $(python) --torch-backend=cpu torch==$(torch_lock); } 2>/dev/null || \
	  { echo "no CPU build in reach, installing the registry's"; $(pip) torch==$(torch_lock); }; }
endif
	@{ grep -v -e '^torch==' -e '^triton==' -e '^sympy==' requirements.lock; \
	  $(python) -c 'import torch; print("torch==" + torch.__version__)'; } > $@

$(VENV)/.train: pyproject.toml $(VENV)/constraints.txt
	$(pip) -c $(VENV)/constraints.txt -e '.[train,sweep]'
	@touch $@

# One stamp for each choice of extras, so that another choice installs again.
comma := ,
$(VENV)/.dev$(EXTRAS:%=-%): pyproject.toml $(VENV)/constraints.txt
	$(pip) -c $(VENV)/constraints.txt -e '.[dev$(EXTRAS:%=$(comma)%)]'
	@touch $@ $(VENV)/.train

install: $(VENV)/.train

demo: $(VENV)/.train
	$(python) -m experiments.train experiment=demo
	$(python) -m experiments.regions --results-dir $(demo_results)
	$(python) -m experiments.tables demo regions --results-dir $(demo_results)
	@echo "tables and figures: $(demo_results)"

test: $(VENV)/.dev$(EXTRAS:%=-%)
	@$(python) -m fff.build || echo "testing without the native operators"
	$(python) -m pytest -q -n auto --maxprocesses 4 --dist worksteal

clean:
	rm -rf $(VENV)
