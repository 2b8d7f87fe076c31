# demo · demo-full · test · check · bench · sanitize · wheels. Each makes .venv when it is missing or older than pyproject.toml and
# constraints.txt, and rebuilds the native library when native/ is newer. Nothing is left outside this folder.
PYTHON ?= python3
# A small download of torch without CUDA: make TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet
PINNED := --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
CXX_FILES := $(wildcard native/*.cpp native/*.hpp native/*.def)

export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib

.PHONY: demo demo-full test test-runtime sanitize check bench wheels docs stub clean

demo: .venv/.built
	$(BIN)/sparsefold demo

# Goes on from what make demo trained: more densities, a sparse decoder, more seeds.
demo-full: .venv/.built
	$(BIN)/sparsefold demo --full

test: .venv/.built
	$(BIN)/python -m pytest

# The wheel, in an environment with numpy and no torch.
test-runtime: .venv-runtime/.built
	.venv-runtime/bin/python -m pytest tests/runtime

check: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/lint-imports

# Engine and training under the address, undefined-behaviour and thread sanitizers, and the reader of files under a fuzzer.
sanitize: .venv/.built
	$(BIN)/python -m pytest tests/native/test_sanitizers.py tests/native/test_fuzz.py

bench: .venv/.built
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/steps.py
	$(BIN)/python bench/throughput.py

# Into dist/, with every python3.11 or newer on the path, each wheel tested with numpy only.
wheels:
	$(PYTHON) .ci/wheels.py

# The tables in README and docs, from the committed results; a test compares them.
docs: .venv/.built
	$(BIN)/python docs/generate.py

# The extension's type stub, after a change of native/bind.cpp; a test compares it with the extension.
stub: .venv/.built
	$(BIN)/python -m nanobind.stubgen -q -m sparsefold._native -o src/sparsefold/_native.pyi
	$(BIN)/ruff format -q src/sparsefold/_native.pyi

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(PINNED) $(BUILD_TOOLS)
	$(PIP) install $(PINNED) --no-build-isolation --editable '.[train,bench,report,sweep,dev]'
	touch $@

.venv/.built: .venv/.installed CMakeLists.txt $(wildcard native/*)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

.venv-runtime/.built: .venv/.built $(wildcard src/sparsefold/*.py)
	test -x .venv-runtime/bin/python || $(PYTHON) -m venv .venv-runtime
	rm -rf .cache/wheel
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir .cache/wheel .
	.venv-runtime/bin/python -m pip install --quiet $(PINNED) numpy pytest hypothesis
	.venv-runtime/bin/python -m pip install --quiet --no-deps --force-reinstall .cache/wheel/*.whl
	touch $@

clean:
	rm -rf .venv .venv-runtime build dist .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
