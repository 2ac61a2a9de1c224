# make quickstart   sets everything up, builds examples/docs-llama and shows what came out
# make example      the same with SmolLM2-135M-Instruct, a public model, in about 12 minutes on two cores
# make test         sets everything up, checks the code and runs the tests
# make test-fast    the tests without whole builds, compilers and servers, in a minute
# make docs         writes the generated pages

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# with a CUDA compiler, also the libraries that the kernels are compiled against
EXTRAS := calibrate,triton,bench,route,dev$(if $(shell command -v nvcc),$(shell echo ,cuda))

.PHONY: quickstart example test test-fast check docs clean

quickstart: $(READY)
	$(BIN)/twofour build examples/quickstart.yaml --out build/quickstart --store build/store

example: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[example]'
	$(BIN)/python examples/smollm2/make_model.py build/smollm2
	$(BIN)/twofour build examples/smollm2/recipe.yaml --out build/smollm2-int8 --store build/store

test: $(READY) check
	$(BIN)/pytest

test-fast: $(READY)
	$(BIN)/pytest --fast -m "not (slow or gpu)" --numprocesses auto --maxprocesses 4 --dist loadfile

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
