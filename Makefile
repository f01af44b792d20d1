# make demo   sets up .venv, then refines the embedded GAN
# make test   sets up .venv, then runs the tests
# A second call installs nothing again; PYTHON=python3.12 make demo picks an interpreter (>= 3.11).

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint setup clean

demo: setup
	$(VENV)/bin/python refine.py --gan

test: setup
	$(VENV)/bin/python -m pytest

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed, $(PYTHON) is older: PYTHON=python3.12 make ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
