# make demo      set up .venv, build and validate build/demo from the trained demo checkpoint, write a few lines
# make test      set up .venv, then lint, types, wheel, C++ library and every test against the installed wheel
# make evidence  the checks that take minutes: sanitizers, fuzzers, the demo in Python and C++, long comparisons
# make cpp       C++ library, examples and tests in build/cpp
#
# Needs python3 (3.11 or 3.12) with venv. The network is used by the set-up steps only.
# PIP_FLAGS goes to every pip install, for example to name another package index.

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt $(PIP_FLAGS)

SOURCES := $(shell find crt_export -name "*.py") $(wildcard graphs/*.toml engines/*.toml \
  validate/tolerances.toml validate/report.schema.json validate/bench.schema.json examples/demo/heldout.txt) \
  $(wildcard crt_export/report/templates/*)
PACKAGING := pyproject.toml README.md LICENSE NOTICE

# TensorRT-RTX has wheels for Linux on x86_64 only; elsewhere the demo leaves its targets out.
PLATFORM := $(shell uname -s)-$(shell uname -m)
RTX_TARGETS := $(if $(filter Linux-x86_64,$(PLATFORM)),rtx-sm80-fp16 rtx-sm80-int8)
DEMO_TARGETS ?= ort-cpu-fp32 ort-cpu-int8 $(RTX_TARGETS)

.PHONY: demo test evidence cpp cpp-if-possible fuzzers lint format wheel setup develop bindings clean help
.DELETE_ON_ERROR:

help:
	@sed -n '1,8s/^# \{0,1\}//p' Makefile

# --- the main job ---------------------------------------------------------------------------------------------
demo: $(VENV)/.installed
	$(BIN)/crt-export build examples/demo/checkpoint --output build/demo \
	  $(foreach target,$(DEMO_TARGETS),--target $(target)) --text examples/demo/heldout.txt
	$(BIN)/crt-export generate build/demo --target ort-cpu-int8 --prompt "The for statement" \
	  --max-new-tokens 240 --temperature 0.7 --top-k 20 --seed 1
	@$(BIN)/crt-export inspect build/demo

# --- tests ----------------------------------------------------------------------------------------------------
# One thread per worker: two test processes that each use every core are slower than one.
TEST_ENVIRONMENT := CRT_EXPORT_REQUIRE_BINDINGS=1 CRT_EXPORT_TEST_INSTALLED=1 OMP_NUM_THREADS=1
PYTEST = CRT_EXPORT_TEST_WHEEL="$$(echo $(CURDIR)/dist/*.whl)" $(TEST_ENVIRONMENT) $(BIN)/pytest \
  -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test: $(VENV)/.dev $(VENV)/.installed bindings
	$(MAKE) --no-print-directory -j$(JOBS) --output-sync=target lint cpp-if-possible
	$(PYTEST) -m "not evidence"

# Python is not built for the sanitizers: it gets their libraries first, and its own leaks are not reported; the C++
# tests report theirs. --capture=sys: what a sanitizer says before it ends the process goes to the terminal.
# allocator_may_return_null=1: a request for more memory than there is fails, as it does outside.
SANITIZERS = $$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so)
evidence: $(VENV)/.dev $(VENV)/.browser $(VENV)/.installed cpp
	$(call cpp-build,build/cpp-sanitize,-DCRT_RUNTIME_SANITIZE=ON)
	LD_PRELOAD=$(SANITIZERS) CRT_RUNTIME_LIBRARY=$(CURDIR)/build/cpp-sanitize/libcrt_runtime.so \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(TEST_ENVIRONMENT) \
	  $(BIN)/pytest validate/cpp -m "not evidence" --capture=sys
	$(MAKE) --no-print-directory fuzzers
	$(BIN)/python validate/prepare.py browser build/browser || \
	  [ $$? -eq 3 -a "$$CRT_EXPORT_REQUIRE_BROWSER" != 1 ]
	$(PYTEST) -m evidence

# --- C++ library ----------------------------------------------------------------------------------------------
# ONNX Runtime of .venv, unless ONNXRUNTIME_ROOT names another.
ORT_FOLDER := build/onnxruntime
PREPARE_CPP := $(BIN)/python engines/cpp/scripts/prepare.py $(ORT_FOLDER)
cpp-build = cmake -S engines/cpp -B $(1) -G Ninja -DCRT_RUNTIME_WERROR=ON $(2) $(CMAKE_FLAGS) \
  -DONNXRUNTIME_ROOT="$${ONNXRUNTIME_ROOT:-$(CURDIR)/$(ORT_FOLDER)}" && cmake --build $(1) --parallel $(JOBS) $(3)
# The examples are projects of their own, which find the installed package.
cpp-examples = cmake --install build/cpp --prefix build/cpp/installed >build/cpp/install.log \
  $(foreach example,02_embed_cpp 03_embed_c,&& cmake -S examples/$(example) -B build/cpp/examples/$(example) -G Ninja \
  -DCMAKE_PREFIX_PATH=$(CURDIR)/build/cpp/installed --log-level=NOTICE && cmake --build build/cpp/examples/$(example))

cpp: $(VENV)/.demo
	$(PREPARE_CPP)
	$(call cpp-build,build/cpp) && $(cpp-examples)

# Where something is missing and CRT_EXPORT_REQUIRE_CPP is not 1, the tests of the library say so and are skipped.
cpp-if-possible: $(VENV)/.demo
	$(PREPARE_CPP) || [ $$? -eq 3 -a "$$CRT_EXPORT_REQUIRE_CPP" != 1 ]
	if [ ! -e $(ORT_FOLDER)/missing.txt ]; then $(call cpp-build,build/cpp) && $(cpp-examples); fi

# libFuzzer targets of the parsers; where clang is missing and cannot be installed, their test says so and is skipped.
FUZZ_FLAGS := -DCRT_RUNTIME_FUZZ=ON -DCRT_RUNTIME_TESTS=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
  -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++
fuzzers: $(VENV)/.demo
	$(PREPARE_CPP)
	$(BIN)/python validate/prepare.py clang build/clang || [ $$? -eq 3 -a "$$CRT_EXPORT_REQUIRE_CPP" != 1 ]
	if [ ! -e build/clang/missing.txt ]; then \
	  $(call cpp-build,build/cpp-fuzz,$(FUZZ_FLAGS),--target crt_fuzz_targets); fi

# --- lint -----------------------------------------------------------------------------------------------------
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- set-up: network is used from here to the end ---------------------------------------------------------------
setup: $(VENV)/.dev $(VENV)/.installed

# An editable installation for development; the next make demo or make test puts the wheel back.
develop: $(VENV)/.dev
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.installed

$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 13) else \
	  f"Python 3.11 or 3.12 is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) hatchling build
	@touch $@

wheel: dist/.built
dist/.built: $(VENV)/.tools $(SOURCES) $(PACKAGING)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	@touch $@

# Dependencies are installed with the wheel's own extras, so that a wrong extra fails here.
$(VENV)/.demo: constraints.txt pyproject.toml | dist/.built
	$(INSTALL) "$$(echo dist/*.whl)[export,cpu,rtx,report]"
	@touch $@

$(VENV)/.dev: constraints.txt pyproject.toml $(VENV)/.demo | dist/.built
	$(INSTALL) "$$(echo dist/*.whl)[export,cpu,rtx,report,sign,dev]"
	@touch $@

# The driver of the browser that the report is looked at with.
$(VENV)/.browser: constraints.txt pyproject.toml $(VENV)/.dev | dist/.built
	$(INSTALL) "$$(echo dist/*.whl)[browser]"
	@touch $@

$(VENV)/.installed: dist/.built $(VENV)/.demo
	$(PIP) install --quiet --no-deps --no-index --force-reinstall dist/*.whl
	@touch $@

# The genuine TensorRT bindings, for the tests that hold the builder's calls against the real signatures.
BINDINGS := validate/unit/engine/install_bindings.py
bindings: $(if $(wildcard $(BINDINGS)),build/bindings/.installed)
build/bindings/.installed: $(BINDINGS) $(VENV)/.dev
	$(BIN)/python $(BINDINGS) build/bindings
	@touch $@

clean:
	rm -rf $(VENV) build dist
