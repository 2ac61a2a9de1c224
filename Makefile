# make quickstart   sets everything up, builds examples/docs-llama and shows what came out
# make test         sets everything up, checks the code and runs the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# with a CUDA compiler, also the libraries that the kernels are compiled against
EXTRAS := calibrate,triton,bench,dev$(if $(shell command -v nvcc),$(shell echo ,cuda))

.PHONY: quickstart test check docs clean

quickstart: $(READY)
	$(BIN)/twofour build examples/quickstart.yaml --out build/quickstart --store build/store

test: $(READY) check
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_pages.py --check

docs: $(READY)
	$(BIN)/python docs/make_pages.py

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build
