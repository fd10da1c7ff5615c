# make demo    set everything up, meta-train on rendered text (42 seconds on two cores), evaluate, show where
# make test    set everything up, run the tests          make test-full   with the slow ones
# make test-peers   examples/ against higher, TorchOpt, JAX and haiku, in an environment of its own (.venv-peers)
# make asan    the CPU worker's tests under AddressSanitizer and UBSan, every instruction set (built aside, build/asan)
# make bench   benchmarks, rows to benchmarks/results.csv   make lint       ruff and mypy
# make docs    the documentation as pages, its gallery made by running it: docs/_build/html/index.html
# make results train and evaluate every kind of signal at small scale; the README's tables and pictures, to docs/
#
# PYTHON=python3.12 picks the interpreter of the virtual environment, VENV=dir its place. An interpreter that has torch
# lends it to the environment; otherwise torch is installed: the CPU build of 2.13 where there is no NVIDIA driver.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.9" || echo "torch==2.13.0")
# Two processes of one thread each: OpenMP teams that outnumber the cores wait for each other.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
# Triton's kernels run under its interpreter, in a process of their own: it is chosen when triton is imported.
INTERPRETED := TRITON_INTERPRET=1 FASTMETA_TEST_IMPLS=triton $(PYTEST)
KERNELS := tests/test_triton.py tests/test_triton_rays.py tests/test_ops.py tests/test_maml.py
# What is too many calls for the interpreter: differences of functions, and long inner loops (order-tasks-steps).
QUICK := -m "not slow" -k "not gradcheck and not render_gradients and not projector_is_linear \
  and not 1-3- and not 3-3- and not 1-5- and not 3-5- and not 10-triton and not 4-triton"
HAS_TRITON := $(BIN)/python -c "import triton" 2>/dev/null
# An older Triton whose compiler is held to the same budgets, and what either has compiled before.
OLD_TRITON := build/triton-3.6.0
COMPILED := TRITON_CACHE_DIR=$(CURDIR)/build/triton-cache \
  FASTMETA_TEST_TRITON="$${FASTMETA_TEST_TRITON-$$(ls -d $(OLD_TRITON) 2>/dev/null)}"

.PHONY: demo test test-full test-peers peers-here asan bench results docs lint clean

SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp)

$(READY): pyproject.toml setup.py $(SOURCES)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "fastmeta needs Python 3.10 or newer; $(PYTHON) is older (set PYTHON=)"; exit 2; }
	@if [ ! -x $(BIN)/python ]; then \
	  if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi; \
	fi
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(HAS_TRITON) || $(BIN)/pip install -q --disable-pip-version-check triton==3.9.0
	@$(BIN)/pip install -q --disable-pip-version-check -e ".[test]"
	@touch $@

# Without it, tests under it are skipped, unless FASTMETA_TEST_TRITON names it.
$(OLD_TRITON): | $(READY)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then rm -rf $@.part; \
	  $(BIN)/pip install -q --disable-pip-version-check --no-deps --target $@.part triton==3.6.0 && mv $@.part $@ \
	    || echo "triton 3.6.0 could not be had: tests under it are skipped"; fi

demo: $(READY)
	@if [ -f $(DEMO)/config.json ]; then $(BIN)/fastmeta train images --out $(DEMO) --resume; \
	else $(BIN)/fastmeta train images --data text --out $(DEMO); fi
	@$(BIN)/fastmeta eval $(DEMO) --count 100

test: $(READY) $(OLD_TRITON)
	@$(COMPILED) $(PYTEST) -m "not slow"
	@! $(HAS_TRITON) || $(INTERPRETED) $(KERNELS) $(QUICK)

test-full: $(READY) $(OLD_TRITON)
	@$(COMPILED) $(PYTEST) --timeout 1800
	@! $(HAS_TRITON) || $(INTERPRETED) $(KERNELS) --timeout 1800

# VENV=.venv-peers, and the rules above make it. Every peer of the extra must be there.
test-peers:
	@$(MAKE) --no-print-directory VENV=$(VENV)-peers peers-here

peers-here: $(READY)
	@$(BIN)/pip install -q --disable-pip-version-check "fastmeta[peers]"
	@FASTMETA_TEST_PEERS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_examples.py -rs

# The tests run from build/asan: python -m pytest puts that folder, and with it the copied package, first.
asan: $(READY)
	@$(BIN)/python -c "import pybind11" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check "pybind11>=2.12"
	@rm -rf build/asan && mkdir -p build/asan && cp -r fastmeta build/asan/ && rm -f build/asan/fastmeta/_cpu*
	@FASTMETA_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/asan --build-temp build/asan/objects
	@ls build/asan/fastmeta/_cpu*.so >/dev/null
	@cd build/asan && export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FASTMETA_TEST_IMPLS=cpu; \
	export OMP_NUM_THREADS=2 LD_PRELOAD="$$(for l in asan ubsan stdc++; do gcc -print-file-name=lib$$l.so; done | xargs)"; \
	isas=$$($(abspath $(BIN))/python -c "from fastmeta._cpu import isas; print(*isas())") || exit 1; \
	for isa in $$isas; do \
	  echo "$$isa"; FASTMETA_ISA=$$isa $(abspath $(BIN))/python -m pytest -x -p no:cacheprovider \
	    $(CURDIR)/tests/test_ops.py $(CURDIR)/tests/test_maml.py || exit 1; \
	done

bench: $(READY)
	@$(BIN)/python -c "import jax" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check jax
	@$(BIN)/python -m pytest benchmarks -p no:xdist --timeout 1800

results: $(READY)
	@$(BIN)/python benchmarks/results.py

# One thread: the gallery's networks are small, and OpenMP teams that share cores wait for each other.
docs: $(READY)
	@$(BIN)/python -c "import furo, myst_parser, sphinx_gallery" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -e ".[docs]"
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

lint: $(READY)
	@$(BIN)/python -c "import ruff, mypy, clang_format" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu

clean:
	rm -rf $(VENV) $(VENV)-peers build dist *.egg-info runs/demo docs/_build docs/auto_gallery
